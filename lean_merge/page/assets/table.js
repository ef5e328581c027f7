// A table of any length: only the rows that can be seen are in the document.

const ROW = 34;
const BEYOND = 12;
const PRINTED = 600;

/**
 * columns: [{ key, title, text(row), value(row), number, header }]; value sorts, null comes last.
 * Rows are numbers; `note(row)` may give the class of one.
 */
class BigTable {
  constructor(box, columns, note) {
    this.box = box;
    this.columns = columns;
    this.note = note || (() => '');
    this.rows = [];
    this.shown = [];
    this.sorted = null;
    this.build();
    box.addEventListener('scroll', () => this.later(), { passive: true });
    new ResizeObserver(() => this.later()).observe(box);
    addEventListener('beforeprint', () => this.paint(true));
    addEventListener('afterprint', () => this.paint());
  }

  build() {
    this.table = element('table');
    this.heads = this.columns.map((column, place) => {
      const cell = element('th', null, { scope: 'col', 'aria-sort': 'none' });
      if (column.number) cell.className = 'number';
      const button = element('button', null, { type: 'button' });
      button.title = column.hint || column.title;
      button.append(element('span', column.title), element('i', '', { 'aria-hidden': 'true' }));
      button.addEventListener('click', () => this.sortBy(place));
      cell.append(button);
      return cell;
    });
    const head = element('thead');
    const line = element('tr', null, { 'aria-rowindex': '1' });
    line.append(...this.heads);
    head.append(line);
    this.body = element('tbody');
    this.table.append(head, this.body);
    this.box.append(this.table);
  }

  /** Shows these rows in their order, or in that of the sorted column. */
  show(rows) {
    this.rows = rows;
    this.order();
    this.box.scrollTop = 0;
    this.paint();
  }

  /** A click sorts numbers from the largest, words from A; another turns it round. */
  sortBy(place) {
    const first = this.columns[place].number ? -1 : 1;
    const same = this.sorted && this.sorted.place === place;
    this.sorted = { place, way: same ? -this.sorted.way : first };
    this.heads.forEach((cell, at) => {
      const word = this.sorted.way > 0 ? 'ascending' : 'descending';
      cell.setAttribute('aria-sort', at === place ? word : 'none');
    });
    this.order();
    this.box.scrollTop = 0;
    this.paint();
  }

  order() {
    this.shown = this.rows.slice();
    if (!this.sorted) return;
    const { place, way } = this.sorted;
    const values = new Map(this.rows.map((row) => [row, this.columns[place].value(row)]));
    const compare = (one, other) => {
      const [a, b] = [values.get(one), values.get(other)];
      if (a === b) return 0;
      if (a === null) return 1;
      if (b === null) return -1;
      if (typeof a === 'string') return way * collator.compare(a, b);
      return way * (a - b);
    };
    this.shown.sort(compare);
  }

  later() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.paint();
    });
  }

  paint(everything) {
    const total = this.shown.length;
    let start = Math.max(0, Math.floor(this.box.scrollTop / ROW) - BEYOND);
    let stop = Math.min(total, start + Math.ceil(this.box.clientHeight / ROW) + 2 * BEYOND);
    if (everything) [start, stop] = [0, Math.min(total, PRINTED)];
    start = Math.min(start, Math.max(0, stop - 1));
    this.table.setAttribute('aria-rowcount', String(total + 1));
    const lines = [this.gap(start)];
    for (let at = start; at < stop; at += 1) lines.push(this.line(this.shown[at], at));
    if (everything && total > stop) {
      const line = element('tr');
      const words = `The first ${stop} of ${total} rows; analysis.json has them all.`;
      line.append(element('td', words, { colspan: String(this.columns.length) }));
      lines.push(line);
    } else {
      lines.push(this.gap(total - stop));
    }
    this.body.replaceChildren(...lines.filter(Boolean));
  }

  gap(count) {
    if (count <= 0) return null;
    const line = element('tr', null, { 'aria-hidden': 'true', class: 'gap' });
    const cell = element('td', null, { colspan: String(this.columns.length) });
    cell.style.height = `${count * ROW}px`;
    line.append(cell);
    return line;
  }

  line(row, at) {
    const line = element('tr', null, { 'aria-rowindex': String(at + 2) });
    line.className = this.note(row);
    for (const column of this.columns) {
      const text = column.text(row);
      const cell = element(column.header ? 'th' : 'td', column.header ? null : text);
      if (column.header) {
        cell.scope = 'row';
        cell.append(breakable(text));
      }
      if (column.number) cell.className = 'number';
      if (column.wide) cell.title = text;
      if (column.mark) cell.dataset.mark = column.mark(row);
      line.append(cell);
    }
    return line;
  }
}

/** A name that may be cut into lines after its dots; more than two would not fit a row. */
function breakable(name) {
  const whole = element('span', null, { class: 'name' });
  name.split(/(?<=[._])/).forEach((part, at) => {
    if (at) whole.append(element('wbr'));
    whole.append(part);
  });
  return whole;
}

const collator = new Intl.Collator('en', { numeric: true });
