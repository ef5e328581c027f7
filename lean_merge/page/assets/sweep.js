// The page of a sweep: one measure along one axis, and the table of all points.

const { axes, points } = data;
const axisNames = Object.keys(axes);
const varied = axisNames.filter((name) => axes[name].length > 1);
const measures = [
  ...data.results.map((name) => ({ title: name, value: (point) => point.results[name] ?? null })),
  { title: 'selected weights', value: (point) => point.selected },
  { title: 'norm of the update', value: (point) => point.update_norm },
  { title: 'own bytes', value: (point) => point.bytes_own },
  { title: 'seconds', value: (point) => point.seconds },
];
const lines = ['accent', 'expert', 'good', 'warn', 'text', 'faint'];
const dashes = ['solid', 'dash', 'dot', 'dashdot'];
const symbols = ['circle', 'square', 'diamond', 'triangle-up', 'triangle-down'];

function linesFigure(width) {
  const measure = measures[Number(byId('measure').value)];
  const axis = byId('axis').value;
  const others = varied.filter((name) => name !== axis);
  const series = new Map();
  for (const point of points) {
    const value = measure.value(point);
    if (value === null || point.parameters[axis] === undefined) continue;
    const name = others.map((other) => `${other} ${point.parameters[other]}`).join(', ');
    if (!series.has(name)) series.set(name, []);
    series.get(name).push({ x: point.parameters[axis], y: value, point });
  }
  const narrow = width < 640;
  const numeric = axes[axis].every((value) => typeof value === 'number');
  const place = (value) => (numeric ? value : axes[axis].indexOf(value));
  const traces = [...series].map(([name, found], number) => {
    found.sort((one, other) => place(one.x) - place(other.x));
    const ink = colour(lines[number % lines.length]);
    return {
      type: 'scatter',
      mode: 'lines+markers',
      name: label(fitted(name || measure.title, narrow ? width - 100 : 0.3 * width)),
      x: found.map((each) => (numeric ? each.x : String(place(each.x)))),
      y: found.map((each) => each.y),
      text: found.map((each) => inLines(each.point.name)),
      line: { color: ink, width: 2, dash: dashes[number % dashes.length] },
      marker: {
        size: 8,
        symbol: symbols[number % symbols.length],
        color: found.map((each) => (each.point.same_as ? colour('panel') : ink)),
        line: { color: ink, width: 1.5 },
      },
      hovertemplate: '%{text}<br>%{y:.4g}<extra></extra>',
    };
  });
  const many = traces.length > 1;
  // Under a narrow plot the lines' names have rows of their own, up to a dozen; the rest scrolls.
  const rows = narrow && many ? Math.min(12, traces.length) : 0;
  const below = { x: 0, y: -64 / 300, yanchor: 'top', maxheight: 20 * rows + 10 };
  const values = traces.flatMap((trace) => trace.y);
  return {
    traces,
    layout: {
      height: 300 + 26 + 60 + 20 * rows,
      margin: { l: 48, r: 16, t: 26, b: 60 + 20 * rows },
      showlegend: many,
      legend: narrow ? below : { x: 1.02, y: 1 },
      xaxis: {
        title: { text: label(fitted(axis, 0.6 * width)) },
        ...(numeric ? {} : words(axes[axis], width)),
      },
      yaxis: { title: { text: label(fitted(measure.title, 240)) }, ...rangeOf(values, measure) },
    },
  };
}

/** An axis of words, cut to what fits under each place. */
function words(values, width) {
  const places = values.map((_, place) => String(place));
  const most = Math.max(40, (0.6 * width) / values.length);
  return {
    type: 'category',
    categoryarray: places,
    range: [-0.5, values.length - 0.5],
    tickvals: places,
    ticktext: values.map((value) => label(fitted(String(value), most))),
    tickangle: 0,
  };
}

/** Counts start at 0; equal values lie in the middle of a narrow range, not between 0 and twice as much. */
function rangeOf(values, measure) {
  if (measure.title === 'selected weights') return { rangemode: 'tozero' };
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (!values.length || low !== high) return {};
  const room = Math.abs(low) / 20 || 1;
  return { range: [low - room, high + room] };
}

const figure = (title, value, hint) => ({
  title,
  hint,
  number: true,
  text: (row) => brief(value(points[row])),
  value: (row) => value(points[row]),
});

const texts = (title, value, more) => ({
  title,
  wide: true,
  text: (row) => value(points[row]) ?? '',
  value: (row) => value(points[row]) || null,
  ...more,
});

function bytes(count) {
  if (count === null) return '—';
  let size = count;
  for (const unit of ['B', 'KiB', 'MiB', 'GiB']) {
    if (size < 1024) return unit === 'B' ? `${size} B` : `${size.toFixed(1)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(1)} TiB`;
}

const table = new BigTable(byId('table'), [
  texts('Merge', (point) => point.name, { header: true }),
  ...varied.map((axis) => {
    const value = (point) => point.parameters[axis] ?? null;
    return axes[axis].every((each) => typeof each === 'number')
      ? { ...figure(axis, value), text: (row) => String(value(points[row]) ?? '—') }
      : texts(axis, value);
  }),
  ...data.results.map((name) => ({
    ...figure(name, (point) => point.results[name] ?? null),
    text: (row) => (points[row].results[name] === undefined ? '—' : String(Number(points[row].results[name].toPrecision(5)))),
  })),
  { ...figure('selected', (point) => point.selected), text: (row) => String(points[row].selected ?? '—') },
  figure('‖update‖', (point) => point.update_norm, 'Root of the sum of all squared norms'),
  { ...figure('own', (point) => point.bytes_own, 'Bytes that only this output holds'), text: (row) => bytes(points[row].bytes_own) },
  { ...figure('shared', (point) => point.bytes_shared, 'Bytes that other outputs hold too'), text: (row) => bytes(points[row].bytes_shared) },
  figure('seconds', (point) => point.seconds),
  texts('same as', (point) => point.same_as),
  texts('error', (point) => point.error),
]);

function showTable() {
  const wanted = byId('find').value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = points.map((_, row) => row).filter((row) => {
    const point = points[row];
    const all = [point.name, point.same_as, point.error, ...Object.values(point.parameters)];
    const text = all.filter((each) => each !== null).join(' ').toLowerCase();
    return wanted.every((word) => text.includes(word));
  });
  table.show(rows);
  byId('table-count').textContent = `${rows.length} of ${points.length} merges`;
}

function start() {
  fill(byId('measure'), measures.map((measure, place) => [place, measure.title]));
  fill(byId('axis'), axisNames.map((axis) => [axis, axis]));
  byId('axis').value = varied[0] || axisNames[0] || '';
  byId('find').addEventListener('input', showTable);
  showTable();
  if (!axisNames.length) return;
  draw('lines', linesFigure);
  for (const id of ['measure', 'axis']) byId(id).addEventListener('change', () => draw('lines', linesFigure));
}

start();
document.documentElement.dataset.ready = 'yes';
