// The page of a comparison: a map of one pair of models, and the table of all weights.

const { weights, modules, pairs, roles } = data;
const [NAME, LAYER, MODULE, SHAPES, MEASURES] = [0, 1, 2, 3, 4];
const titles = { 0: 'cosine', 2: 'distance' };

const chosen = () => ({
  pair: Number(byId('pair').value),
  measure: Number(document.querySelector('[name=measure]:checked').value),
});

function heatFigure(width) {
  const { pair, measure } = chosen();
  const known = weights.filter((row) => row[LAYER] !== null);
  const layers = [...new Set(known.map((row) => row[LAYER]))].sort((a, b) => a - b);
  const places = [...new Set(known.map((row) => row[MODULE]))];
  const cells = new Map();
  for (const row of known) {
    const value = row[MEASURES][pair][measure];
    const key = `${row[MODULE]} ${row[LAYER]}`;
    if (value === null) continue;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(value);
  }
  const middle = (values) => values && values.sort((a, b) => a - b)[values.length >> 1];
  const z = places.map((place) => layers.map((layer) => middle(cells.get(`${place} ${layer}`)) ?? null));
  const text = places.map((place, line) =>
    layers.map((layer, column) => `layer ${layer}, ${inLines(modules[place])}<br>${titles[measure]} ${z[line][column]?.toFixed(4)}`),
  );
  const found = z.flat().filter((value) => value !== null);
  const range = [Math.min(0, ...found), Math.max(measure === 0 ? 1 : 0.01, ...found)];
  return heatMap({ width, names: places.map((place) => modules[place]), layers, z, text, title: titles[measure], range });
}

function showHeat() {
  const { pair } = chosen();
  const compared = weights.filter((row) => row[MEASURES][pair][0] !== null).length;
  byId('heat').hidden = !compared;
  byId('heat-note').textContent = compared
    ? `${compared} of ${weights.length} weights can be compared${compared < weights.length ? '; the other cells are empty' : ''}.`
    : 'No weight has the same shape in both.';
  if (compared) draw('heat', heatFigure);
}

const table = new BigTable(byId('table'), [
  { title: 'Weight', header: true, wide: true, text: (row) => weights[row][NAME], value: (row) => weights[row][NAME] },
  ...roles.map((role, place) => ({
    title: role,
    hint: `Shape in the ${role}`,
    text: (row) => weights[row][SHAPES][place] || '—',
    value: (row) => weights[row][SHAPES][place],
  })),
  ...pairs.flatMap((pair, place) =>
    [0, 2].map((measure) => ({
      title: `${titles[measure]}: ${pair}`,
      number: true,
      text: (row) => weights[row][MEASURES][place][measure]?.toFixed(4) ?? '—',
      value: (row) => weights[row][MEASURES][place][measure],
    })),
  ),
]);

function showTable() {
  const words = byId('find').value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = weights.map((_, row) => row).filter((row) => {
    const name = weights[row][NAME].toLowerCase();
    return words.every((word) => name.includes(word));
  });
  table.show(rows);
  byId('table-count').textContent = `${rows.length} of ${weights.length} weights`;
}

function start() {
  fill(byId('pair'), pairs.map((name, place) => [place, name]));
  const best = pairs.findIndex((_, place) => weights.some((row) => row[MEASURES][place][0] !== null));
  byId('pair').value = String(Math.max(0, best));
  byId('find').addEventListener('input', showTable);
  byId('pair').addEventListener('change', showHeat);
  for (const radio of document.querySelectorAll('[name=measure]')) radio.addEventListener('change', showHeat);
  showTable();
  if (pairs.length) showHeat();
}

start();
document.documentElement.dataset.ready = 'yes';
