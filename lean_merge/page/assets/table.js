// A table of any length, of which only the rows that can be seen are in the document.

const ROW = 34; // The height of a row in pixels, as style.css has it.
const BEYOND = 12;
const PRINTED = 600;
const collator = new Intl.Collator('en', { numeric: true });

/**
 * The table of assets/table.html, with the field that finds words in it.
 *
 * what: the plural of a row. rows: numbers, in their order. searched(row): the text in which words are
 * found. keep(row): whether other filters keep a row. mark(row): its class. columns, of which the first
 * names the row: [{ title, hint, number, value(row), text(row) }], where `value` sorts, and `text` is
 * what is shown, by default the value.
 */
class BigTable {
  constructor(options) {
    Object.assign(this, { keep: () => true, mark: () => '', shown: [], sorted: null }, options);
    this.box = byId('table');
    this.heads = this.columns.map((column, place) => this.head(column, place));
    this.table = element('table');
    this.body = element('tbody');
    const head = element('thead');
    head.append(element('tr', null, { 'aria-rowindex': 1 }));
    head.firstChild.append(...this.heads);
    this.table.append(head, this.body);
    this.box.append(this.table);
    const later = () => requestAnimationFrame(() => this.paint());
    this.box.addEventListener('scroll', later, { passive: true });
    new ResizeObserver(later).observe(this.box);
    byId('find').addEventListener('input', () => this.show());
    addEventListener('beforeprint', () => this.paint(true));
    addEventListener('afterprint', () => this.paint());
    this.show();
  }

  head(column, place) {
    const cell = element('th', null, { scope: 'col', 'aria-sort': 'none', class: column.number ? 'number' : '' });
    const button = element('button', column.title, { type: 'button', title: column.hint || column.title });
    button.addEventListener('click', () => {
      // A click sorts numbers from the largest and words from A, and another turns the order round.
      const way = this.sorted?.place === place ? -this.sorted.way : column.number ? -1 : 1;
      this.sorted = { place, way };
      this.heads.forEach((each) => each.setAttribute('aria-sort', 'none'));
      cell.setAttribute('aria-sort', way > 0 ? 'ascending' : 'descending');
      this.show();
    });
    cell.append(button);
    return cell;
  }

  /** Finds, filters and sorts anew. */
  show() {
    const words = byId('find').value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = (row) => words.every((word) => this.searched(row).toLowerCase().includes(word));
    this.shown = this.rows.filter((row) => this.keep(row) && found(row));
    if (this.sorted) this.sort(this.columns[this.sorted.place], this.sorted.way);
    byId('count').textContent = `${this.shown.length} of ${this.rows.length} ${this.what}`;
    this.box.scrollTop = 0;
    this.paint();
  }

  sort(column, way) {
    this.shown.sort((one, other) => {
      const [a, b] = [column.value(one) ?? null, column.value(other) ?? null];
      if (a === null || b === null) return (a === null) - (b === null);
      return way * (typeof a === 'string' ? collator.compare(a, b) : a - b);
    });
  }

  paint(printing) {
    const total = this.shown.length;
    const first = printing ? 0 : Math.max(0, Math.floor(this.box.scrollTop / ROW) - BEYOND);
    const many = printing ? PRINTED : Math.ceil(this.box.clientHeight / ROW) + 2 * BEYOND;
    const start = Math.min(first, Math.max(0, total - 1));
    const stop = Math.min(total, start + many);
    const lines = this.shown.slice(start, stop).map((row, place) => this.line(row, start + place));
    this.table.setAttribute('aria-rowcount', total + 1);
    this.body.replaceChildren(this.gap(start), ...lines, this.gap(printing ? 0 : total - stop));
    this.box.previousElementSibling.classList.toggle('needed', this.box.scrollWidth > this.box.clientWidth);
    if (printing && total > stop) this.body.append(element('tr', `${total - stop} more rows are not printed.`));
  }

  /** An empty row as high as so many. */
  gap(count) {
    const line = element('tr', null, { 'aria-hidden': true, class: 'gap' });
    line.hidden = !count;
    line.style.height = `${count * ROW}px`;
    return line;
  }

  line(row, place) {
    const line = element('tr', null, { 'aria-rowindex': place + 2, class: this.mark(row) });
    this.columns.forEach(({ number, value, text }, column) => {
      const words = (text || value)(row) ?? '';
      const cell = column ? element('td', words) : element('th', null, { scope: 'row' });
      if (!column) cell.append(breakable(words));
      if (number) cell.className = 'number';
      cell.title = words;
      line.append(cell);
    });
    return line;
  }
}

/** A name that breaks into lines after its dots and underscores. */
function breakable(name) {
  const whole = element('span', null, { class: 'name' });
  whole.append(...name.split(/(?<=[._])/).flatMap((part) => [part, element('wbr')]));
  return whole;
}
