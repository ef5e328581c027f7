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

/** The same for an axis, where a long name would leave no room. */
function axisLabel(text) {
  return label(text.length > 24 ? `${text.slice(0, 23)}…` : text);
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

/** Draws into an element, again whenever the theme changes; `figure` makes traces and layout. */
function draw(id, figure) {
  const target = typeof id === 'string' ? byId(id) : id;
  drawings.set(target, figure);
  const { traces, layout } = figure();
  return Plotly.react(target, traces, themed(layout || {}), {
    displaylogo: false,
    responsive: true,
    scrollZoom: false,
    // Shown by style.css under a pointer; nothing that leaves this page is among them.
    displayModeBar: true,
    doubleClick: 'reset',
    modeBarButtons: [['toImage', 'resetScale2d']],
    toImageButtonOptions: { format: 'svg', filename: target.id || 'lean-merge' },
  });
}

/** Forgets the drawings of an element's children, which are then removed. */
function clear(parent) {
  for (const child of [...parent.children]) {
    if (drawings.delete(child)) Plotly.purge(child);
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
    font: { family: 'system-ui, -apple-system, "Segoe UI", sans-serif', size: 12, color: colour('soft') },
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

/** Ticks of a logarithmic axis over positive values: 1, 2, 5, or powers of ten where those do. */
function logTicks(values) {
  const known = values.filter((value) => value > 0);
  if (!known.length) return {};
  const low = Math.floor(Math.log10(Math.min(...known)));
  const high = Math.ceil(Math.log10(Math.max(...known)));
  const step = Math.ceil((high - low) / 6);
  const digits = high - low > 2 ? [1] : high - low > 1 ? [1, 3] : [1, 2, 5];
  const tickvals = [];
  for (let power = low; power <= high; power += Math.max(1, step)) {
    tickvals.push(...digits.map((digit) => digit * 10 ** power));
  }
  return { tickvals, ticktext: tickvals.map((value) => String(Number(value.toPrecision(1)))) };
}

/** From low to high, in the theme in force. */
function scale() {
  return ['0', '0.25', '0.5', '0.75', '1'].map((at, step) => [Number(at), colour(`scale-${step}`)]);
}

function redraw() {
  for (const [target, figure] of drawings) if (target.isConnected) draw(target, figure);
}

matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
// Paper is white whatever the screen was.
matchMedia('print').addEventListener('change', redraw);
