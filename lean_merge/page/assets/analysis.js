// The report of an analysis: one state, which everything that is drawn follows.

const { weights, columns, modules, spectra } = data;
const state = { expert: 0, threshold: null };
const ours = () => columns[state.expert];

// Layer 2 comes before layer 10, and what has no layer last.
const rows = [...weights.name.keys()].sort(
  (one, other) =>
    (weights.layer[one] ?? Infinity) - (weights.layer[other] ?? Infinity) ||
    weights.module[one] - weights.module[other] ||
    collator.compare(weights.name[one], weights.name[other]),
);

/** Whether a weight is selected: as the recipe decided, or as the threshold that is being tried would. */
function isSelected(row) {
  const { threshold, selected } = ours();
  if (state.threshold === null) return selected[row];
  const compared = ours()[threshold.select_by][row];
  return compared !== null && compared >= state.threshold;
}

const chosenOf = (some) => some.filter(isSelected).length;

// --- the threshold

/** A threshold in two decimals, or as many as it has. */
const decimals = (value) => (value === Number(value?.toFixed(2)) ? value.toFixed(2) : String(value));

/** The layout of weights over [0, 1], with marked places. */
const overOne = (words, most, marks) => ({
  ...markers([{ at: ours().threshold.unrelated, text: '99 % of unrelated', name: 'soft', dash: 'dot' }, ...marks]),
  xaxis: { range: [0, 1], title: { text: words } },
  yaxis: { range: [0, Math.max(1, most) * 1.05], title: { text: 'weights' } },
});

/** The thresholds that are marked in both plots. */
function thresholdMarks() {
  const { auto, in_force: inForce } = ours().threshold;
  return [
    { at: auto, text: `auto ${decimals(auto)}`, name: 'good', dash: 'dash' },
    { at: inForce, text: `recipe ${decimals(inForce)}`, name: 'text' },
    { at: state.threshold, text: `tried ${decimals(state.threshold)}`, name: 'accent' },
  ];
}

function countsFigure() {
  const { counts } = ours().threshold;
  const selected = counts.map((pair) => pair[1]);
  const trace = {
    type: 'scatter', mode: 'lines', fill: 'tozeroy', fillcolor: `${colour('accent')}22`,
    line: { shape: 'hv', color: colour('accent'), width: 2 },
    x: counts.map((pair) => pair[0]),
    y: selected,
    hovertemplate: '%{y} weights at %{x:.2f}<extra></extra>',
  };
  const layout = overOne('threshold', Math.max(...selected), thresholdMarks());
  return { traces: [trace], layout };
}

function histogramFigure() {
  const { first, expected } = ours();
  const bins = expected.length;
  const seen = new Array(bins).fill(0);
  for (const s of first) if (s !== null) seen[Math.min(bins - 1, Math.floor(s * bins))] += 1;
  const bars = {
    type: 'bar', name: 'these models', width: 1 / bins, marker: { color: colour('accent') },
    x: seen.map((_, bin) => (bin + 0.5) / bins),
    y: seen,
    hovertemplate: '%{y} weights around %{x:.2f}<extra></extra>',
  };
  const law = {
    type: 'scatter', mode: 'lines', name: 'unrelated models', line: { color: colour('warn'), width: 2 },
    x: expected.flatMap((_, bin) => [bin / bins, (bin + 1) / bins]),
    y: expected.flatMap((many) => [many, many]),
    hovertemplate: '%{y:.1f} weights expected<extra></extra>',
  };
  const layout = {
    ...overOne('s<sub>1</sub>', Math.max(...seen, ...expected), thresholdMarks()),
    bargap: 0,
    showlegend: true,
    legend: { x: 1, xanchor: 'right', y: 1, yanchor: 'top', bgcolor: 'transparent' },
  };
  return { traces: [bars, law], layout };
}

// --- layer by layer

const measures = [
  { title: 's₁', name: 'similarity', key: 'first', range: [0, 1] },
  { title: '‖update‖', name: 'norm of the update', key: 'update' },
  { title: '‖update‖ / ‖λ ΔM‖', name: 'relative update', key: 'relative' },
  { title: 'λ', name: 'λ', key: 'lambda' },
];

function mapFigure(width) {
  const { title, key, range } = measures[byId('measure').value];
  const said = (some) => (some.length ? `<br>${chosenOf(some)} of ${some.length} selected` : '');
  const map = layerMap(width, { title, range, value: (row) => ours()[key][row], said });
  const chosen = [...cells].filter(([, some]) => 2 * chosenOf(some) >= some.length);
  const places = chosen.map(([cell]) => cell.split(' '));
  const size = Math.max(2, Math.min(7, (width - 160) / layers.length / 3));
  map.traces.push({
    type: 'scatter', mode: 'markers', hoverinfo: 'skip',
    x: places.map(([, layer]) => layer),
    y: places.map(([module]) => module),
    marker: { size, color: colour('panel'), line: { color: colour('text'), width: 1 } },
  });
  return map;
}

function showMap() {
  const lost = weights.layer.filter((layer) => layer === null).length;
  byId('heat').hidden = !cells.size;
  byId('heat-note').textContent = [
    'A dot marks what the threshold selects.',
    [...cells.values()].some((some) => some.length > 1)
      ? 'A cell of several weights shows their median, and a dot where at least half of them are selected.'
      : '',
    'An update is what selection would bring, whether the weight is selected or not.',
    lost ? `${lost} weights without a layer are only in the table below.` : '',
  ].join(' ');
  if (cells.size) draw(byId('heat'), mapFigure);
}

// --- spectra

/** The curves of a group that have values: the MLLM's and the chosen expert's. */
const curvesOf = ({ curves }) =>
  [
    { name: 'accent', title: 'MLLM', ...curves[0] },
    { name: 'expert', title: 'expert', ...curves[1 + state.expert] },
  ].filter((curve) => curve.mid.length);

function spectrumFigure(group, height, axis) {
  const traces = curvesOf(group).flatMap(({ name, title, mid, low, high }) => {
    const ranks = mid.map((_, at) => at + 1);
    const line = {
      type: 'scatter', mode: ranks.length < 3 ? 'markers' : 'lines', name: title,
      x: ranks, y: mid, line: { color: colour(name), width: 2 },
      hovertemplate: 'σ%{x} = %{y:.3g}<extra></extra>',
    };
    const band = {
      type: 'scatter', mode: 'lines', hoverinfo: 'skip', line: { width: 0 },
      fill: 'toself', fillcolor: `${colour(name)}29`,
      x: [...ranks, ...ranks.slice().reverse()],
      y: [...high, ...low.slice().reverse()],
    };
    return group.weights > 1 ? [band, line] : [line];
  });
  const layout = {
    height,
    margin: { l: 48, r: 8, t: 10, b: 40 },
    xaxis: { title: { text: 'rank' }, rangemode: 'tozero' },
    yaxis: { type: 'log', title: { text: 'σ' }, ...axis },
  };
  return { traces, layout };
}

function showSpectra() {
  const layer = byId('spectrum-layer').value;
  const module = byId('spectrum-module').value;
  byId('spectrum-expert').textContent = data.experts[state.expert];
  const found = spectra.filter(
    (group) => String(group.layer) === layer && (module === 'all' || group.module === Number(module)),
  );
  // All modules share one axis, on which they can be compared.
  const axis = logAxis(found.flatMap(curvesOf).flatMap(({ mid, low, high }) => [...mid, ...low, ...high]));
  const box = byId('spectrum-plots');
  box.replaceChildren();
  for (const group of found) {
    const name = modules[group.module];
    const figure = element('figure');
    const words = group.weights > 1 ? `${name} · ${group.weights} weights` : name;
    const plot = element('div', null, { class: 'plot', role: 'img', 'aria-label': `Singular values of ${name}` });
    figure.append(element('figcaption', words, { title: name }), plot);
    box.append(figure);
    draw(plot, () => spectrumFigure(group, found.length > 1 ? 200 : 380, axis));
  }
  if (!found.length) box.append(element('p', 'This layer has no such module.', { class: 'hint' }));
}

// --- the table

const figure = (key) => ({
  number: true,
  value: (row) => ours()[key][row],
  text: (row) => brief(ours()[key][row]),
});

const firstOf = (row) => `${ours().gap[row] ? '⚠ ' : ''}${brief(ours().first[row])}`;
const states = {
  all: () => true,
  selected: isSelected,
  'not selected': (row) => !isSelected(row),
  'ill-defined v₁': (row) => ours().gap[row],
};

/** The figures of the overview, and the command, for the threshold in force. */
function showTiles(tried) {
  const { update, relative, threshold } = ours();
  const chosen = rows.filter((row) => isSelected(row) && update[row] !== null);
  const norm = Math.hypot(...chosen.map((row) => update[row]));
  const whole = Math.hypot(...chosen.map((row) => (relative[row] ? update[row] / relative[row] : 0)));
  const say = (name, text) => { byId(`tile-${name}-${state.expert}`).textContent = text; };
  say('selected', `${chosenOf(rows)} of ${rows.length}`);
  say('threshold', tried === null ? 'varies' : decimals(tried));
  say('norm', chosen.length ? brief(norm) : '—');
  say('share', whole ? `${brief((100 * norm) / whole)} %` : '—');
  const command = byId('command');
  if (!command) return;
  const wanted = state.threshold === null ? 'auto' : decimals(state.threshold);
  command.textContent = command.textContent.replace(/--threshold \S+/, `--threshold ${wanted}`);
}

/** Everything that depends on the threshold. */
function showSelection() {
  const inForce = ours().threshold.in_force;
  const tried = state.threshold ?? inForce;
  byId('slider').value = tried ?? 0.4;
  byId('slider-value').textContent = tried === null ? 'by weight' : decimals(tried);
  const chosen = `${chosenOf(rows)} of ${rows.length} weights`;
  byId('slider-count').textContent =
    state.threshold === null ? `${chosen} selected, as in the recipe` : `${chosen} would be selected`;
  byId('reset').hidden = state.threshold === null;
  showTiles(tried);
  draw(byId('counts'), countsFigure);
  draw(byId('histogram'), histogramFigure);
  showMap();
  table.show();
}

function tryThreshold(value) {
  state.threshold = value;
  requestAnimationFrame(showSelection);
}

function showExpert() {
  // Another expert's tiles go back to the recipe with the threshold that was tried.
  if (state.threshold !== null) {
    state.threshold = null;
    showTiles(ours().threshold.in_force);
  }
  Object.assign(state, { expert: Number(byId('expert').value), threshold: null });
  showSelection();
  showSpectra();
}

fill('expert', data.experts.entries(), showExpert);
fill('measure', measures.map(({ name }) => name).entries(), showMap);
fill('spectrum-layer', [['null', 'all layers'], ...layers.map((layer) => [layer, layer])], showSpectra);
fill('spectrum-module', [['all', 'all'], ...modules.entries()], showSpectra);
fill('only', Object.keys(states).map((name) => [name, name]), () => table.show());
byId('slider').addEventListener('input', () => tryThreshold(Number(byId('slider').value)));
byId('reset').addEventListener('click', () => tryThreshold(null));
document.querySelector('.chooser').hidden = data.experts.length < 2;

const table = new BigTable({
  what: 'weights',
  rows,
  searched: (row) => weights.name[row],
  keep: (row) => states[byId('only').value](row),
  mark: (row) => (isSelected(row) ? 'chosen' : ''),
  columns: [
    { title: 'Weight', value: (row) => weights.name[row] },
    { title: 'Selected', value: (row) => !isSelected(row), text: (row) => (isSelected(row) ? 'yes' : 'no') },
    { title: 's₁', hint: 'Similarity of the leading right singular vectors', ...figure('first'), text: firstOf },
    { title: 'max s', hint: 'Largest similarity of corresponding directions', ...figure('max') },
    { title: 'unrelated', hint: '99 % of unrelated task vectors of this shape stay below', ...figure('unrelated') },
    { title: 'λ', hint: 'Ratio of the nuclear norms', ...figure('lambda') },
    { title: '‖update‖', hint: 'Frobenius norm of the update, were the weight selected', ...figure('update') },
    { title: 'relative', hint: '‖update‖ / ‖λ ΔM‖', ...figure('relative') },
    { title: 'eff. rank', hint: 'Effective rank of the update', ...figure('rank') },
    { title: 'energy kept', hint: 'Share of the task vector that the projection keeps', ...figure('kept') },
    { title: 'Shape', value: (row) => weights.shape[row] },
    { title: 'Reason', value: (row) => ours().reason[row] },
  ],
});
showExpert();
document.documentElement.dataset.ready = 'yes';
