// The page of a sweep: one measure along one axis, and the table of all points.

const { axes, points, receiver } = data;
const overMethods = Boolean(axes.method);
const varied = Object.keys(axes).filter((name) => axes[name].length > 1);
const isNumeric = (axis) => axes[axis].every((value) => typeof value === 'number');
const exact = (value) => (value === null || value === undefined ? '—' : String(Number(value.toPrecision(5))));
const mebibytes = (count) => (count === null ? null : count / 2 ** 20);
const measures = [
  ...data.results.map((name) => ({
    title: name,
    of: (point) => point.results[name] ?? null,
    bounds: (point) => point.bounds[name],
    text: exact,
  })),
  { title: 'selected', hint: 'Weights that are selected', of: (point) => point.selected, text: exact },
  { title: '‖update‖', hint: 'Root of the sum of all squared norms', of: (point) => point.update_norm },
  { title: 'own MiB', hint: 'Files that only this output holds', of: (point) => mebibytes(point.bytes_own) },
  { title: 'shared MiB', hint: 'Files that other outputs hold too', of: (point) => mebibytes(point.bytes_shared) },
  { title: 'seconds', of: (point) => point.seconds },
];
const inks = ['accent', 'expert', 'good', 'warn', 'text', 'soft'];
const dashes = ['solid', 'dash', 'dot', 'dashdot'];
const symbols = ['circle', 'square', 'diamond', 'triangle-up', 'triangle-down'];

/** A share as a percentage with its interval, as text. */
const percent = (value) => (100 * value).toFixed(1);
const withBounds = (text, bounds) => (bounds ? `${text} [${bounds.map(percent).join(', ')}] %` : text);

/** The interval of every point of a line, as Plotly draws them; nothing where there is none. */
function intervals(found, measure, ink) {
  if (!measure.bounds || !found.some((point) => measure.bounds(point))) return {};
  const reach = (side) => found.map((point) => {
    const bounds = measure.bounds(point);
    return bounds ? Math.abs(bounds[side] - measure.of(point)) : 0;
  });
  return { error_y: { type: 'data', symmetric: false, array: reach(1), arrayminus: reach(0), color: ink, width: 3, thickness: 1 } };
}

/** The points that have a value, by the values of all axes but one. */
function seriesOf(measure, axis) {
  const series = new Map();
  for (const point of points) {
    if (measure.of(point) === null || point.parameters[axis] === undefined) continue;
    const others = varied.filter((name) => name !== axis && point.parameters[name] !== undefined);
    const name = others.map((other) => `${other} ${point.parameters[other]}`).join(', ');
    series.set(name, [...(series.get(name) || []), point]);
  }
  return series;
}

/** The lines of one measure along the chosen axis, and what was measured of the receiver. */
function linesOf(measure, width) {
  const axis = byId('axis').value;
  // Words stand at the place of their value, under which they are cut to what fits.
  const place = (value) => (isNumeric(axis) ? value : axes[axis].indexOf(value));
  const traces = [...seriesOf(measure, axis)].map(([name, found], number) => {
    found.sort((one, other) => place(one.parameters[axis]) - place(other.parameters[axis]));
    const ink = colour(inks[number % inks.length]);
    return {
      type: 'scatter',
      mode: 'lines+markers',
      name: label(fitted(name || measure.title, Math.min(600, width - 100))),
      x: found.map((point) => place(point.parameters[axis])),
      y: found.map(measure.of),
      text: found.map((point) => inLines(point.name)),
      ...intervals(found, measure, ink),
      line: { color: ink, width: 2, dash: dashes[number % dashes.length] },
      marker: {
        size: 8, symbol: symbols[number % symbols.length], line: { color: ink, width: 1.5 },
        color: found.map((point) => (point.same_as ? colour('panel') : ink)),
      },
      hovertemplate: '%{text}<br>%{y:.4g}<extra></extra>',
    };
  });
  const measured = receiver[measure.title];
  const places = traces.flatMap(({ x }) => x);
  if (measured !== undefined && places.length) {
    traces.push({
      type: 'scatter',
      mode: 'lines',
      name: 'the receiving model',
      x: [Math.min(...places), Math.max(...places)],
      y: [measured, measured],
      line: { color: colour('text'), width: 1, dash: 'dot' },
      hovertemplate: 'the receiving model<br>%{y:.4g}<extra></extra>',
    });
  }
  const room = Math.max(40, (0.6 * width) / axes[axis].length);
  const words = axes[axis].map((value) => label(fitted(String(value), room)));
  const ticks = { tickvals: [...words.keys()], ticktext: words, range: [-0.5, words.length - 0.5], tickangle: 0 };
  // The names of the lines stand below, up to a dozen; the rest scrolls.
  const rows = traces.length > 1 ? Math.min(12, traces.length) : 0;
  return {
    traces,
    layout: {
      height: 386 + 20 * rows,
      margin: { l: 48, r: 16, t: 26, b: 60 + 20 * rows },
      showlegend: rows > 0,
      legend: { x: 0, y: -64 / 300, yanchor: 'top', maxheight: 20 * rows + 10 },
      xaxis: { title: { text: label(fitted(axis, 0.6 * width)) }, ...(isNumeric(axis) ? {} : ticks) },
      yaxis: { title: { text: label(fitted(measure.title, 240)) } },
    },
  };
}

new BigTable({
  what: 'merges',
  rows: [...points.keys()],
  searched: (row) => [points[row].name, points[row].same_as, points[row].error].join(' '),
  columns: [
    { title: 'Merge', value: (row) => points[row].name },
    ...varied.map((axis) => ({ title: axis, number: isNumeric(axis), value: (row) => points[row].parameters[axis] })),
    ...measures.map(({ title, hint, of, text, bounds }) => ({
      title,
      hint,
      number: true,
      value: (row) => of(points[row]),
      text: (row) => {
        const known = bounds?.(points[row]);
        return known ? withBounds(percent(of(points[row])), known) : (text || brief)(of(points[row]));
      },
    })),
    { title: 'same as', value: (row) => points[row].same_as },
    { title: 'error', value: (row) => points[row].error },
  ],
});

const chosen = (width) => linesOf(measures[byId('measure').value], width);
const plots = overMethods ? data.results.map((name, number) => [measures[number], element('div', '', {
  class: 'plot', id: `measured-${number}`, role: 'img', 'aria-label': `${name} of every method`,
})]) : [];
byId('lines').after(...plots.map(([, plot]) => plot));
// With several methods every measured number has its plot; the one above them shows what is chosen.
const show = () => {
  draw(byId('lines'), chosen);
  for (const [measure, plot] of plots) draw(plot, (width) => linesOf(measure, width));
};
fill('measure', measures.map(({ title }) => title).entries(), show);
fill('axis', Object.keys(axes).map((axis) => [axis, axis]), show);
// Methods with different parameters stand side by side; an axis that all of them have joins them by lines.
const shared = varied.find((axis) => isNumeric(axis) && points.every((point) => point.parameters[axis] !== undefined));
byId('axis').value = (overMethods && (shared || 'method')) || varied[0] || Object.keys(axes)[0] || '';
if (plots.length) byId('measure').value = data.results.length;
if (byId('axis').value) show();
document.documentElement.dataset.ready = 'yes';
