// What all pages share: the theme's colours, numbers as text, and drawing with Plotly.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId('data').textContent);
const FONT = 'system-ui, -apple-system, "Segoe UI", sans-serif';
const ruler = document.createElement('canvas').getContext('2d');

/** The value of a colour of style.css in the theme in force: six hexadecimal digits after a #. */
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Text for Plotly, which reads some tags in labels: a stranger's name is not markup. */
const label = (text) => String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');

/** A whole name for a label under the pointer, in lines that fit a phone. */
const inLines = (text) => (text.match(/.{1,36}/gsu) || ['']).map(label).join('<br>');

/** The width of a text in a plot, in pixels. */
function widthOf(text) {
  ruler.font = `12px ${FONT}`;
  return ruler.measureText(text).width;
}

/** A text of at most so many pixels: what does not fit is cut out of its middle. */
function fitted(text, most) {
  const letters = [...text];
  let kept = letters.length;
  let cut = text;
  while (kept > 2 && widthOf(cut) > most) {
    kept = Math.floor(0.95 * kept);
    cut = `${letters.slice(0, kept >> 1).join('')}…${letters.slice((kept >> 1) - kept).join('')}`;
  }
  return cut;
}

/** A number with three significant digits; a dash where there is none. */
function brief(value) {
  if (value === null || value === undefined) return '—';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1);
  return size >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

function median(values) {
  const known = values.filter((value) => value !== null).sort((a, b) => a - b);
  const half = known.length >> 1;
  if (!known.length) return null;
  return known.length % 2 ? known[half] : (known[half - 1] + known[half]) / 2;
}

/** A new element with text and attributes. */
function element(tag, text, attributes) {
  const made = document.createElement(tag);
  made.textContent = text ?? '';
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  return made;
}

/** Copies the command of the first section, or selects it where the browser does not let pages copy. */
byId('copy')?.addEventListener('click', async () => {
  const command = byId('command');
  try {
    await navigator.clipboard.writeText(command.textContent);
    byId('copy').textContent = 'Copied';
  } catch {
    getSelection().selectAllChildren(command);
    byId('copy').textContent = 'Selected';
  }
  setTimeout(() => { byId('copy').textContent = 'Copy'; }, 2000);
});

/** Fills a <select> with [value, text] pairs and calls `changed` whenever another is chosen. */
function fill(id, pairs, changed) {
  for (const [value, text] of pairs) byId(id).append(element('option', text, { value }));
  byId(id).addEventListener('input', changed);
}

const drawings = new Map();

/**
 * Draws into an element what `figure(width)` makes, again whenever the theme or the width changes.
 *
 * Another width is drawn from nothing: what Plotly keeps from a drawing of the old width, such as the
 * room for a scale that stood elsewhere, can leave no room for the plot.
 */
function draw(target, figure) {
  const width = target.clientWidth;
  const way = drawings.get(target)?.width === width ? Plotly.react : Plotly.newPlot;
  drawings.set(target, { figure, width });
  widths.observe(target);
  if (!width) return;
  const { traces, layout } = figure(width);
  way(target, traces, { ...themed(layout), width }, {
    displaylogo: false,
    modeBarButtons: [['toImage', 'resetScale2d']],
    toImageButtonOptions: { format: 'svg', filename: target.id || 'lean-merge' },
  });
}

/** Draws again what has another width than it was drawn for, or everything. */
function redraw(everything) {
  for (const [target, { figure, width }] of drawings) {
    if (!target.isConnected) drawings.delete(target);
    else if (everything || target.clientWidth !== width) draw(target, figure);
  }
}

const widths = new ResizeObserver(() => requestAnimationFrame(() => redraw(false)));
// Paper is white whatever the screen was.
for (const query of ['(prefers-color-scheme: dark)', 'print']) {
  matchMedia(query).addEventListener('change', () => redraw(true));
}

/** A layout in the colours of the theme. */
function themed(layout) {
  const touched = matchMedia('(pointer: coarse)').matches;
  const lines = { gridcolor: colour('grid'), linecolor: colour('line'), tickcolor: colour('line') };
  const axis = { ...lines, zeroline: false, ticks: 'outside', automargin: true, fixedrange: touched };
  return {
    height: 300,
    margin: { l: 48, r: 16, t: 26, b: 44 },
    paper_bgcolor: 'transparent', plot_bgcolor: 'transparent',
    font: { family: FONT, size: 12, color: colour('soft') },
    hoverlabel: { bgcolor: colour('panel'), font: { color: colour('text') } },
    modebar: { bgcolor: 'transparent', color: colour('soft'), activecolor: colour('text') },
    showlegend: false,
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
}

/** Upright lines with words at their tops, as a part of a layout: [{ at, text, name, dash }]. */
function markers(list) {
  const known = list.filter((each) => each.at !== null).sort((one, other) => one.at - other.at);
  return {
    margin: { l: 48, r: 16, t: 26 + 15 * Math.max(0, known.length - 1), b: 44 },
    shapes: known.map(({ at, name, dash }) => ({
      type: 'line', x0: at, x1: at, y0: 0, y1: 1, yref: 'paper',
      line: { color: colour(name), width: 1.5, dash: dash || 'solid' },
    })),
    annotations: known.map(({ at, text, name }, place) => ({
      text, x: at, xanchor: at > 0.6 ? 'right' : 'left', showarrow: false,
      y: 1, yref: 'paper', yanchor: 'middle', yshift: 9 + 15 * (known.length - 1 - place),
      font: { color: colour(name), size: 11 },
    })),
  };
}

/**
 * A logarithmic axis over the positive of these values. It ends six powers of ten below the largest: what
 * rounding left beyond a matrix's rank would press the rest together.
 */
function logAxis(values) {
  const known = values.filter((value) => value > 0);
  if (!known.length) return {};
  const top = Math.log10(Math.max(...known));
  const bottom = Math.max(top - 6, Math.log10(Math.min(...known)));
  const room = Math.max(0.02, 0.05 * (top - bottom));
  const digits = top - bottom > 2 ? [1] : [1, 2, 5];
  const tickvals = [];
  for (let power = Math.floor(bottom - room); power <= top + room; power += 1) {
    tickvals.push(...digits.map((digit) => digit * 10 ** power));
  }
  const ticktext = tickvals.map((value) => String(Number(value.toPrecision(1))));
  return { range: [bottom - room, top + room], tickvals, ticktext };
}

/** The rows of `data.weights` that have a layer, by module and layer. */
const cells = new Map();
(data.weights?.layer || []).forEach((layer, row) => {
  const key = `${data.weights.module[row]} ${layer}`;
  if (layer !== null) cells.set(key, [...(cells.get(key) || []), row]);
});
const layers = [...new Set((data.weights?.layer || []).filter((layer) => layer !== null))].sort((a, b) => a - b);

/**
 * A map of modules by layers, whose cells keep their height and, whatever the names, half of the width.
 *
 * `value(row)` is what is shown, the median where a cell has several rows; `said(rows)` is more text for
 * the label under the pointer.
 */
function layerMap(width, { title, range, value, said }) {
  const narrow = width < 520;
  const shown = [...data.modules.keys()].filter((module) => layers.some((layer) => cells.has(`${module} ${layer}`)));
  const names = shown.map((module) => fitted(data.modules[module], 0.3 * width));
  const places = shown.map(String);
  const tall = Math.max(3, shown.length) * 34;
  const below = { orientation: 'h', x: 0, xanchor: 'left', y: -62 / tall, yanchor: 'top', xpad: 0 };
  const eachCell = (make) =>
    shown.map((module) => layers.map((layer) => make(cells.get(`${module} ${layer}`) || [], module, layer)));
  const middle = (rows) => median(rows.map(value));
  const words = (rows, module, layer) => {
    const many = rows.length > 1 ? ` (median of ${rows.length})` : '';
    return `layer ${layer}, ${inLines(data.modules[module])}<br>${title} ${brief(middle(rows))}${many}${said(rows)}`;
  };
  const heat = {
    type: 'heatmap',
    x: layers.map(String),
    y: places,
    z: eachCell(middle),
    text: eachCell(words),
    hovertemplate: '%{text}<extra></extra>',
    hoverongaps: false,
    xgap: layers.length > 40 ? 0.5 : 1.5, ygap: 1.5,
    colorscale: [[0, colour('low')], [0.7, colour('accent')], [1, colour('high')]],
    ...(range ? { zmin: range[0], zmax: range[1] } : {}),
    colorbar: {
      title: { text: title, side: narrow ? 'top' : 'right' },
      thickness: 12, outlinewidth: 0, len: 1, ...(narrow ? below : {}),
    },
  };
  const axis = { type: 'category', showgrid: false };
  const across = { range: [-0.5, layers.length - 0.5], nticks: narrow ? 9 : 24, tickangle: 0 };
  const down = { range: [shown.length - 0.5, -0.5], tickvals: places, ticktext: names.map(label) };
  const layout = {
    height: tall + (narrow ? 154 : 66),
    margin: { l: 14 + Math.max(34, ...names.map(widthOf)), r: 10, t: 18, b: narrow ? 136 : 48 },
    xaxis: { ...axis, ...across, title: { text: 'layer' } },
    yaxis: { ...axis, ...down, ticks: '', automargin: false },
  };
  return { traces: [heat], layout };
}
