// The page of a comparison: a map of one pair of models, and the table of all weights.

const { weights, pairs } = data;
const measures = [
  { title: 'cosine', key: 'cosine', range: [0, 1] },
  { title: 'relative distance', key: 'distance', range: [0, data.farthest] },
];

function showMap() {
  const pair = pairs[byId('pair').value];
  const { title, key, range } = measures[byId('measure').value];
  const compared = pair[key].filter((value) => value !== null).length;
  byId('heat').hidden = !compared;
  byId('heat-note').textContent = compared
    ? `${compared} of ${pair[key].length} weights can be compared. The cells of the others are empty.`
    : 'No weight has the same shape in both.';
  const value = (row) => pair[key][row];
  if (compared) draw(byId('heat'), (width) => layerMap(width, { title, range, value, said: () => '' }));
}

const measured = (pair, { key, title }) => ({
  title: `${title}: ${pair.name}`,
  number: true,
  value: (row) => pair[key][row],
  text: (row) => pair[key][row]?.toFixed(4) ?? '—',
});

new BigTable({
  what: 'weights',
  rows: [...weights.name.keys()],
  searched: (row) => weights.name[row],
  columns: [
    { title: 'Weight', value: (row) => weights.name[row] },
    ...data.roles.map((role, place) => ({
      title: role,
      hint: `Shape in the ${role}`,
      value: (row) => weights.shapes[place][row],
      text: (row) => weights.shapes[place][row] ?? '—',
    })),
    ...pairs.flatMap((pair) => measures.map((measure) => measured(pair, measure))),
  ],
});

fill('measure', measures.map(({ title }) => title).entries(), showMap);
fill('pair', pairs.map(({ name }) => name).entries(), showMap);
if (pairs.length) showMap();
document.documentElement.dataset.ready = 'yes';
