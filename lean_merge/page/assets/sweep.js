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

function linesFigure() {
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
  const numeric = axes[axis].every((value) => typeof value === 'number');
  const place = (value) => (numeric ? value : axes[axis].indexOf(value));
  const traces = [...series].map(([name, found], number) => {
    found.sort((one, other) => place(one.x) - place(other.x));
    const ink = colour(lines[number % lines.length]);
    return {
      type: 'scatter',
      mode: 'lines+markers',
      name: label(name || measure.title),
      x: found.map((each) => (numeric ? each.x : label(each.x))),
      y: found.map((each) => each.y),
      text: found.map((each) => label(each.point.name)),
      line: { color: ink, width: 2, dash: dashes[Math.floor(number / lines.length) % dashes.length] },
      marker: {
        size: 8,
        color: found.map((each) => (each.point.same_as ? colour('panel') : ink)),
        line: { color: ink, width: 1.5 },
      },
      hovertemplate: '%{text}<br>%{y:.4g}<extra></extra>',
    };
  });
  const narrow = byId('lines').clientWidth < 520;
  const many = traces.length > 1;
  return {
    traces,
    layout: {
      height: 380 + (narrow && many ? 24 * Math.min(8, traces.length) : 0),
      showlegend: many,
      legend: narrow ? { orientation: 'h', y: -0.25, yanchor: 'top' } : { x: 1.02, y: 1 },
      xaxis: {
        title: { text: label(axis) },
        ...(numeric ? {} : { type: 'category', categoryarray: axes[axis].map(label) }),
      },
      yaxis: { title: { text: label(measure.title) }, rangemode: measure.title === 'selected weights' ? 'tozero' : 'normal' },
    },
  };
}

const figure = (title, value, hint) => ({
  title,
  hint,
  number: true,
  text: (row) => brief(value(points[row])),
  value: (row) => value(points[row]),
});

const words = (title, value, more) => ({
  title,
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
  words('Merge', (point) => point.name, { header: true, wide: true }),
  ...varied.map((axis) => {
    const value = (point) => point.parameters[axis] ?? null;
    return axes[axis].every((each) => typeof each === 'number')
      ? { ...figure(axis, value), text: (row) => String(value(points[row]) ?? '—') }
      : words(axis, value);
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
  words('same as', (point) => point.same_as),
  words('error', (point) => point.error, { wide: true }),
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
