// The report of an analysis: one state, which everything that is drawn follows.

const { weights, columns, modules, spectra } = data;
const count = weights.name.length;
const every = Array.from({ length: count }, (_, row) => row).sort(
  // Layer 2 before layer 10, and what has no layer last.
  (one, other) =>
    (weights.layer[one] ?? Infinity) - (weights.layer[other] ?? Infinity) ||
    weights.module[one] - weights.module[other] ||
    collator.compare(weights.name[one], weights.name[other]),
);
const state = { expert: 0, threshold: null, measure: 'first' };

const ours = () => columns[state.expert];

/** What is compared with the threshold. */
const compared = (row) => ours()[ours().threshold.select_by][row];

/** As the recipe decided, or as the threshold that is being tried would. */
function isSelected(row) {
  if (state.threshold === null) return ours().selected[row];
  const found = compared(row);
  return ours().able[row] && found !== null && found >= state.threshold;
}

// --- the threshold

/** A threshold in two decimals, or as many as it has. */
const places = (value) =>
  value === null ? '' : value === Number(value.toFixed(2)) ? value.toFixed(2) : String(value);

function countsFigure() {
  const { threshold } = ours();
  const pairs = threshold.counts.length ? threshold.counts : counted();
  const marks = markers([
    { at: threshold.null, text: '99 % of unrelated', name: 'faint', dash: 'dot' },
    { at: threshold.auto, text: `auto ${places(threshold.auto)}`, name: 'good', dash: 'dash' },
    { at: threshold.in_force, text: `recipe ${places(threshold.in_force)}`, name: 'text' },
    ...(state.threshold === null ? [] : [{ at: state.threshold, text: `tried ${places(state.threshold)}`, name: 'accent' }]),
  ]);
  return {
    traces: [
      {
        type: 'scatter',
        mode: 'lines',
        line: { shape: 'hv', color: colour('accent'), width: 2 },
        fill: 'tozeroy',
        fillcolor: colour('accent-faint'),
        x: pairs.map((pair) => pair[0]),
        y: pairs.map((pair) => pair[1]),
        hovertemplate: '%{y} weights at %{x:.2f}<extra></extra>',
      },
    ],
    layout: {
      shapes: marks.shapes,
      annotations: marks.annotations,
      margin: { l: 48, r: 16, t: marks.top, b: 44 },
      xaxis: { range: [0, 1], title: { text: 'threshold' } },
      yaxis: { range: [0, Math.max(1, ...pairs.map((pair) => pair[1])) * 1.05], title: { text: 'weights' } },
    },
  };
}

/** Counts from the columns, where the analysis brings none. */
function counted() {
  const found = every.filter((row) => ours().able[row]).map(compared);
  return Array.from({ length: 101 }, (_, n) => [n / 100, found.filter((s) => s >= n / 100).length]);
}

function histogramFigure() {
  const { first, expected, threshold } = ours();
  const bins = expected.length;
  const seen = new Array(bins).fill(0);
  for (const s of first) if (s !== null) seen[Math.min(bins - 1, Math.floor(s * bins))] += 1;
  const middle = seen.map((_, n) => (n + 0.5) / bins);
  const edges = expected.flatMap((_, n) => [n / bins, (n + 1) / bins]);
  const top = Math.max(1, ...seen, ...expected) * 1.05;
  const marks = markers([{ at: threshold.null, text: '99 % of unrelated', name: 'faint', dash: 'dot' }]);
  return {
    traces: [
      {
        type: 'bar',
        name: 'these models',
        x: middle,
        y: seen,
        width: 1 / bins,
        marker: { color: colour('accent'), line: { width: 0 } },
        hovertemplate: '%{y} weights around %{x:.2f}<extra></extra>',
      },
      {
        type: 'scatter',
        mode: 'lines',
        name: 'unrelated models',
        x: edges,
        y: expected.flatMap((n) => [n, n]),
        line: { color: colour('warn'), width: 2 },
        hovertemplate: '%{y:.1f} weights expected<extra></extra>',
      },
    ],
    layout: {
      shapes: marks.shapes,
      annotations: marks.annotations,
      margin: { l: 48, r: 16, t: marks.top, b: 44 },
      bargap: 0,
      showlegend: true,
      legend: { x: 1, xanchor: 'right', y: 1, yanchor: 'top', bgcolor: 'rgba(0,0,0,0)' },
      xaxis: { range: [0, 1], title: { text: 's<sub>1</sub>' } },
      yaxis: { range: [0, top], title: { text: 'weights' } },
    },
  };
}

function showThreshold() {
  const { threshold } = ours();
  const tried = state.threshold === null ? threshold.in_force : state.threshold;
  byId('slider').value = String(tried === null ? 0.4 : tried);
  byId('slider-value').textContent = tried === null ? 'by weight' : places(tried);
  const chosen = every.filter(isSelected).length;
  const said = state.threshold === null ? 'as in the recipe' : 'would be';
  byId('slider-count').textContent = `${chosen} of ${count} weights selected, ${said}`.replace(
    'selected, would be',
    'would be selected',
  );
  byId('reset').hidden = state.threshold === null;
}

// --- layer by layer

const measures = {
  first: { title: 's₁', range: [0, 1] },
  update: { title: '‖update‖' },
  relative: { title: '‖update‖ / ‖λ ΔM‖' },
  lambda: { title: 'λ' },
};

const cells = new Map();
for (const row of every) {
  if (weights.layer[row] === null) continue;
  const key = `${weights.module[row]} ${weights.layer[row]}`;
  if (!cells.has(key)) cells.set(key, []);
  cells.get(key).push(row);
}
const mapped = modules.map((_, place) => place).filter((place) =>
  spectra.layers.some((layer) => cells.has(`${place} ${layer}`)),
);

function median(values) {
  const known = values.filter((value) => value !== null).sort((a, b) => a - b);
  if (!known.length) return null;
  const half = known.length >> 1;
  return known.length % 2 ? known[half] : (known[half - 1] + known[half]) / 2;
}

function heatFigure(width) {
  const measure = measures[state.measure];
  const at = (place, layer) => cells.get(`${place} ${layer}`) || [];
  const z = mapped.map((place) =>
    spectra.layers.map((layer) => median(at(place, layer).map((row) => ours()[state.measure][row]))),
  );
  const text = mapped.map((place, line) =>
    spectra.layers.map((layer, column) => {
      const rows = at(place, layer);
      if (!rows.length) return '';
      const chosen = rows.filter(isSelected).length;
      const many = rows.length > 1 ? ` (median of ${rows.length})` : '';
      const said = rows.length > 1 ? `${chosen} of ${rows.length} selected` : chosen ? 'selected' : 'not selected';
      return `layer ${layer}, ${inLines(modules[place])}<br>${measure.title} ${brief(z[line][column])}${many}<br>${said}`;
    }),
  );
  const dots = { x: [], y: [] };
  mapped.forEach((place, line) => {
    for (const layer of spectra.layers) {
      const rows = at(place, layer);
      if (rows.length && 2 * rows.filter(isSelected).length >= rows.length) {
        dots.x.push(String(layer));
        dots.y.push(String(line));
      }
    }
  });
  const map = heatMap({
    width,
    names: mapped.map((place) => modules[place]),
    layers: spectra.layers,
    z,
    text,
    title: measure.title,
    range: measure.range,
  });
  const size = Math.max(2, Math.min(7, (width - 160) / spectra.layers.length / 3));
  map.traces.push({
    type: 'scatter',
    mode: 'markers',
    ...dots,
    hoverinfo: 'skip',
    marker: { symbol: 'circle', size, color: colour('dot'), line: { color: colour('dot-line'), width: 1 } },
  });
  return map;
}

function showHeat() {
  const lost = every.filter((row) => weights.layer[row] === null).length;
  const grouped = [...cells.values()].some((rows) => rows.length > 1);
  byId('heat-note').textContent = [
    'A dot marks what the threshold selects.',
    grouped ? 'Of several weights in one cell the median is shown, and a dot if half of them are selected.' : '',
    state.measure === 'update' || state.measure === 'relative'
      ? 'The update is that which selection would bring, whether the weight is selected or not.'
      : '',
    lost ? `${lost} weights without a layer are only in the table below.` : '',
  ].join(' ');
  byId('heat').hidden = !mapped.length;
  if (mapped.length) draw('heat', heatFigure);
}

// --- spectra

const MOST_PLOTS = 12;
const curves = new Map(spectra.groups.map((group) => [`${group[0]} ${group[1]}`, group]));

const rolesOf = (group) =>
  [
    { curve: group[3], name: 'mllm', title: 'MLLM' },
    { curve: group[4 + state.expert], name: 'expert', title: 'expert' },
  ].filter((role) => role.curve && role.curve.mid.length);

/** The values of groups, on which they share one axis: modules are to be compared. */
const heights = (groups) =>
  groups.flatMap(rolesOf).flatMap(({ curve }) => [...curve.mid, ...(curve.low || []), ...(curve.high || [])]);

function spectrumFigure(group, shown) {
  const roles = rolesOf(group);
  const traces = roles.flatMap(({ curve, name, title }) => {
    const ranks = curve.mid.map((_, at) => at + 1);
    const line = {
      type: 'scatter',
      mode: ranks.length < 3 ? 'markers' : 'lines',
      name: title,
      x: ranks,
      y: curve.mid,
      line: { color: colour(name), width: 2 },
      hovertemplate: 'σ%{x} = %{y:.3g}<extra></extra>',
    };
    if (!curve.low) return [line];
    return [
      {
        type: 'scatter',
        mode: 'lines',
        x: [...ranks, ...ranks.slice().reverse()],
        y: [...curve.high, ...curve.low.slice().reverse()],
        fill: 'toself',
        fillcolor: colour(`${name}-faint`),
        line: { width: 0 },
        hoverinfo: 'skip',
      },
      line,
    ];
  });
  return {
    traces,
    layout: {
      height: shown.length > 1 ? 200 : 380,
      margin: { l: 48, r: 8, t: 10, b: 40 },
      xaxis: { title: { text: 'rank' }, rangemode: 'tozero' },
      yaxis: { type: 'log', title: { text: 'σ' }, ...logAxis(heights(shown)) },
    },
  };
}

function showSpectra() {
  const layer = byId('spectrum-layer').value;
  const module = byId('spectrum-module').value;
  byId('spectrum-expert').textContent = data.experts[state.expert] || 'expert';
  const box = byId('spectrum-plots');
  clear(box);
  let places = module === '' ? modules.map((_, place) => place) : [Number(module)];
  const found = places.map((place) => curves.get(`${place} ${layer}`)).filter(Boolean);
  box.classList.toggle('single', found.length === 1);
  const shown = found.slice(0, MOST_PLOTS);
  for (const group of shown) {
    const figure = element('figure');
    const many = group[2] > 1 ? ` · ${group[2]} weights` : '';
    figure.append(element('figcaption', `${modules[group[0]]}${many}`, { title: modules[group[0]] }));
    const words = `Singular values of ${modules[group[0]]}`;
    const plot = element('div', null, { class: 'plot', role: 'img', 'aria-label': words });
    figure.append(plot);
    box.append(figure);
    draw(plot, () => spectrumFigure(group, shown));
  }
  if (!found.length) box.append(element('p', 'This layer has no such module.', { class: 'hint' }));
  if (found.length > MOST_PLOTS) {
    const words = `${found.length - MOST_PLOTS} more modules can be chosen above.`;
    box.append(element('p', words, { class: 'hint' }));
  }
}

// --- the table

const numbers = (key) => ({
  number: true,
  text: (row) => brief(ours()[key][row]),
  value: (row) => ours()[key][row],
});

const table = new BigTable(
  byId('table'),
  [
    { title: 'Weight', header: true, wide: true, text: (row) => weights.name[row], value: (row) => weights.name[row] },
    {
      title: 'Selected',
      text: (row) => (isSelected(row) ? 'yes' : 'no'),
      value: (row) => (isSelected(row) ? 'a' : 'b'),
      mark: (row) => (isSelected(row) ? 'yes' : 'no'),
    },
    {
      title: 's₁',
      hint: 'Similarity of the leading right singular vectors',
      ...numbers('first'),
      text: (row) => `${ours().gap[row] ? '⚠ ' : ''}${brief(ours().first[row])}`,
    },
    { title: 'max s', hint: 'Largest similarity of corresponding directions', ...numbers('max') },
    { title: 'unrelated', hint: 's₁ that 99 % of unrelated task vectors of this shape stay below', ...numbers('null') },
    { title: 'λ', hint: 'Ratio of the nuclear norms', ...numbers('lambda') },
    { title: '‖update‖', hint: 'Frobenius norm of the update, were the weight selected', ...numbers('update') },
    { title: 'relative', hint: '‖update‖ / ‖λ ΔM‖', ...numbers('relative') },
    { title: 'eff. rank', hint: 'Effective rank of the update', ...numbers('rank') },
    { title: 'energy kept', hint: 'Share of the task vector that the projection keeps', ...numbers('kept') },
    { title: 'Shape', text: (row) => weights.shape[row], value: (row) => weights.shape[row] },
    {
      title: 'Reason',
      wide: true,
      text: (row) => ours().reasons[ours().reason[row]],
      value: (row) => ours().reasons[ours().reason[row]],
    },
  ],
  (row) => (isSelected(row) ? 'chosen' : ''),
);

function showTable() {
  const words = byId('find').value.toLowerCase().split(/\s+/).filter(Boolean);
  const module = byId('only-module').value;
  const wanted = byId('only-state').value;
  const rows = every.filter((row) => {
    if (module !== '' && weights.module[row] !== Number(module)) return false;
    if (wanted === 'selected' && !isSelected(row)) return false;
    if (wanted === 'other' && isSelected(row)) return false;
    if (wanted === 'gap' && !ours().gap[row]) return false;
    const name = weights.name[row].toLowerCase();
    return words.every((word) => name.includes(word));
  });
  table.show(rows);
  byId('table-count').textContent = `${rows.length} of ${count} weights`;
}

// --- all of it

function showAll() {
  for (const each of document.querySelectorAll('.explanation')) {
    each.hidden = Number(each.dataset.expert) !== state.expert;
  }
  showThreshold();
  draw('counts', countsFigure);
  draw('histogram', histogramFigure);
  showHeat();
  showTable();
}

function chooseExpert(value) {
  state.expert = Number(value);
  state.threshold = null;
  showAll();
  showSpectra();
}

let waiting = false;
function tryThreshold(value) {
  state.threshold = value;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    showThreshold();
    draw('counts', countsFigure);
    showHeat();
    showTable();
  });
}

function start() {
  fill(byId('spectrum-layer'), [['null', 'all layers'], ...spectra.layers.map((n) => [n, n])]);
  fill(byId('spectrum-module'), [['', 'all'], ...modules.map((name, place) => [place, name])]);
  fill(byId('only-module'), modules.map((name, place) => [place, name]));
  for (const id of ['spectrum-layer', 'spectrum-module']) byId(id).addEventListener('change', showSpectra);
  for (const id of ['find', 'only-module', 'only-state']) byId(id).addEventListener('input', showTable);
  for (const radio of document.querySelectorAll('[name=expert]')) {
    radio.addEventListener('change', () => chooseExpert(radio.value));
  }
  if (byId('expert')) byId('expert').addEventListener('change', (event) => chooseExpert(event.target.value));
  for (const radio of document.querySelectorAll('[name=measure]')) {
    radio.addEventListener('change', () => {
      state.measure = radio.value;
      showHeat();
    });
  }
  byId('slider').addEventListener('input', (event) => tryThreshold(Number(event.target.value)));
  byId('reset').addEventListener('click', () => tryThreshold(null));
  if (!columns.length) return;
  showAll();
  showSpectra();
}

start();
document.documentElement.dataset.ready = 'yes';
