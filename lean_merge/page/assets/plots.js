// What all pages share: colours of the theme, numbers as text, and drawing with Plotly.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId('data').textContent);

/** The value of a colour of style.css in the theme in force. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Text for Plotly, which reads some tags in labels: a stranger's name is not markup. */
function label(text) {
  return String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
}

const FONT = 'system-ui, -apple-system, "Segoe UI", sans-serif';
const ruler = document.createElement('canvas').getContext('2d');

/** The width of a text in a plot, in pixels. */
function widthOf(text) {
  ruler.font = `12px ${FONT}`;
  return ruler.measureText(text).width;
}

/** A text of at most so many pixels; what is cut out of a longer one is its middle. */
function fitted(text, most) {
  const letters = [...text];
  if (widthOf(text) <= most) return text;
  const cut = (kept) => `${letters.slice(0, Math.ceil(kept / 2)).join('')}…${letters.slice(letters.length - Math.floor(kept / 2)).join('')}`;
  let [low, high] = [1, letters.length];
  while (high - low > 1) {
    const kept = (low + high) >> 1;
    if (widthOf(cut(kept)) <= most) low = kept;
    else high = kept;
  }
  return cut(low);
}

/** A whole name for a label under the pointer, in lines that fit a phone. */
function inLines(text) {
  return (text.match(/.{1,36}/gsu) || ['']).map(label).join('<br>');
}

/** A number with three significant digits; a dash for none. */
function brief(value) {
  if (value === null || value === undefined) return '—';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1);
  if (size >= 100) return value.toFixed(0);
  return value.toPrecision(3);
}

/** A new element with text and attributes. */
function element(tag, text, attributes) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  return made;
}

/** Fills a <select> with [value, text] pairs. */
function fill(select, pairs) {
  for (const [value, text] of pairs) select.append(element('option', text, { value }));
}

const drawings = new Map();

/**
 * Draws into an element, again whenever the theme or the element's width changes.
 *
 * `figure(width)` makes traces and a layout. Plotly is told the width and does not look for it: what
 * it keeps from a drawing of another width, such as the room for a scale that stood elsewhere, can
 * leave no room for the plot, so that another width is drawn from nothing.
 */
function draw(id, figure) {
  const target = typeof id === 'string' ? byId(id) : id;
  const before = drawings.get(target);
  const width = target.clientWidth;
  drawings.set(target, { figure, width });
  widths.observe(target);
  if (!width) return;
  const { traces, layout } = figure(width);
  const way = before && before.width === width ? Plotly.react : Plotly.newPlot;
  way(target, traces, { ...themed(layout || {}), width }, {
    displaylogo: false,
    scrollZoom: false,
    // Shown by style.css under a pointer; nothing that leaves this page is among them.
    displayModeBar: true,
    doubleClick: 'reset',
    modeBarButtons: [['toImage', 'resetScale2d']],
    toImageButtonOptions: { format: 'svg', filename: target.id || 'lean-merge' },
  });
}

const widths = new ResizeObserver(() => requestAnimationFrame(() => redraw(false)));

/** Forgets the drawings of an element's children, which are then removed. */
function clear(parent) {
  for (const child of [...parent.children]) {
    if (drawings.delete(child)) {
      widths.unobserve(child);
      Plotly.purge(child);
    }
    child.remove();
  }
}

function themed(layout) {
  const axis = {
    gridcolor: colour('grid'),
    linecolor: colour('line'),
    zeroline: false,
    tickcolor: colour('line'),
    ticks: 'outside',
    ticklen: 4,
    automargin: true,
    fixedrange: matchMedia('(pointer: coarse)').matches,
  };
  const whole = {
    height: 300,
    margin: { l: 48, r: 16, t: 26, b: 44 },
    paper_bgcolor: 'rgba(0,0,0,0)',
    plot_bgcolor: 'rgba(0,0,0,0)',
    font: { family: FONT, size: 12, color: colour('soft') },
    hoverlabel: {
      bgcolor: colour('panel'),
      bordercolor: colour('line'),
      font: { color: colour('text'), size: 12 },
    },
    modebar: { bgcolor: 'rgba(0,0,0,0)', color: colour('faint'), activecolor: colour('text') },
    showlegend: false,
    ...layout,
  };
  for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
    whole[name] = { ...axis, ...layout[name] };
  }
  whole.xaxis = whole.xaxis || axis;
  whole.yaxis = whole.yaxis || axis;
  return whole;
}

/** Upright lines with words at their tops: [{at, text, name, dash}], from left to right. */
function markers(list) {
  const known = list.filter((each) => each.at !== null && each.at !== undefined);
  known.sort((one, other) => one.at - other.at);
  return {
    shapes: known.map((each) => ({
      type: 'line',
      x0: each.at,
      x1: each.at,
      y0: 0,
      y1: 1,
      yref: 'paper',
      line: { color: colour(each.name), width: 1.5, dash: each.dash || 'solid' },
    })),
    annotations: known.map((each, place) => ({
      x: each.at,
      y: 1,
      yref: 'paper',
      yshift: 9 + 15 * ((known.length - 1 - place) % 3),
      xanchor: each.at > 0.6 ? 'right' : 'left',
      yanchor: 'middle',
      text: label(each.text),
      showarrow: false,
      font: { color: colour(each.name), size: 11 },
    })),
    top: 26 + 15 * Math.max(0, Math.min(known.length, 3) - 1),
  };
}

const DECADES = 6;

/**
 * A logarithmic axis over the positive of these values, at most so many powers of ten below the
 * largest: what rounding left beyond a matrix's rank would press the rest together. Ticks are 1, 2, 5,
 * or powers of ten where those do.
 */
function logAxis(values) {
  const known = values.filter((value) => value > 0);
  if (!known.length) return {};
  const top = Math.log10(Math.max(...known));
  const bottom = Math.max(top - DECADES, Math.log10(Math.min(...known)));
  const room = Math.max(0.02, 0.05 * (top - bottom));
  const [low, high] = [Math.floor(bottom - room), Math.ceil(top + room)];
  const step = Math.ceil((high - low) / 6);
  const digits = top - bottom > 2 ? [1] : top - bottom > 1 ? [1, 3] : [1, 2, 5];
  const tickvals = [];
  for (let power = low; power <= high; power += Math.max(1, step)) {
    tickvals.push(...digits.map((digit) => digit * 10 ** power));
  }
  const ticktext = tickvals.map((value) => (value < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(1)))));
  return { range: [bottom - room, top + room], tickvals, ticktext };
}

/** From low to high, in the theme in force. */
function scale() {
  return ['0', '0.25', '0.5', '0.75', '1'].map((at, step) => [Number(at), colour(`scale-${step}`)]);
}

/**
 * A map of modules by layers: traces, and a layout in which the cells keep their height and, whatever
 * the names, half of the width.
 */
function heatMap({ width, names, layers, z, text, title, range }) {
  const narrow = width < 520;
  const labels = names.map((name) => fitted(name, width * (narrow ? 0.36 : 0.3)));
  const left = 14 + Math.max(34, ...labels.map(widthOf));
  const tall = Math.max(3, names.length) * 34;
  const place = (pixels) => -pixels / tall;
  const below = { orientation: 'h', x: 0, xanchor: 'left', y: place(62), yanchor: 'top', len: 1 };
  const rows = names.map((_, row) => String(row));
  return {
    traces: [
      {
        type: 'heatmap',
        x: layers.map(String),
        y: rows,
        z,
        text,
        hovertemplate: '%{text}<extra></extra>',
        hoverongaps: false,
        xgap: layers.length > 40 ? 0.5 : 1.5,
        ygap: 1.5,
        colorscale: scale(),
        ...(range ? { zmin: range[0], zmax: range[1] } : {}),
        colorbar: {
          title: { text: title, side: narrow ? 'top' : 'right' },
          thickness: 12,
          outlinewidth: 0,
          xpad: narrow ? 0 : 10,
          ...(narrow ? below : { len: 1 }),
        },
      },
    ],
    layout: {
      height: tall + (narrow ? 154 : 66),
      margin: { l: left, r: 10, t: 18, b: narrow ? 136 : 48 },
      xaxis: { type: 'category', range: [-0.5, layers.length - 0.5], showgrid: false, title: { text: 'layer' }, nticks: narrow ? 9 : 24, tickangle: 0 },
      yaxis: { type: 'category', range: [names.length - 0.5, -0.5], showgrid: false, ticks: '', automargin: false, tickvals: rows, ticktext: labels.map(label) },
    },
  };
}

/** Draws again what has another width than it was drawn for, or everything. */
function redraw(everything) {
  for (const [target, { figure, width }] of drawings) {
    if (target.isConnected && (everything || target.clientWidth !== width)) draw(target, figure);
  }
}

matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => redraw(true));
// Paper is white whatever the screen was.
matchMedia('print').addEventListener('change', () => redraw(true));
