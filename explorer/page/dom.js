// Elements, lists of any length that hold only the rows in sight, and tables of these.

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list" && name !== "role") element[name] = value;
    else element.setAttribute(name, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) element.append(child instanceof Node ? child : visible(child));
  }
  return element;
}

const byId = (id) => document.getElementById(id);

const ROW = 19;
const MOST_PIXELS = 8e6; // browsers place nothing exactly far beyond

// Rows of one height in a scrolling box. `draw(index)` gives an element; only rows in sight exist.
class Rows {
  constructor(box, draw) {
    this.box = box;
    this.draw = draw;
    this.count = 0;
    this.space = make("div", { className: "space", role: "presentation" });
    this.shown = new Map();
    box.append(this.space);
    box.addEventListener("scroll", () => this.paint(), { passive: true });
    new ResizeObserver(() => this.paint()).observe(box);
  }
  set(count, characters = 0) {
    this.count = count;
    this.scale = Math.min(1, MOST_PIXELS / Math.max(count * ROW, 1));
    this.space.style.height = `${Math.max(count * ROW * this.scale, 1)}px`;
    this.space.style.width = characters ? `calc(${characters}ch + 110px)` : "auto";
    this.refresh();
  }
  refresh() {
    for (const row of this.shown.values()) row.remove();
    this.shown.clear();
    this.paint();
  }
  get first() { return Math.floor(this.box.scrollTop / (ROW * (this.scale || 1))); }
  get visibleRows() { return Math.ceil(this.box.clientHeight / ROW) + 1; }
  paint() {
    if (!this.box.clientHeight) return;
    const first = Math.max(this.first - 4, 0), last = Math.min(this.first + this.visibleRows + 4, this.count);
    for (const [index, row] of this.shown) if (index < first || index >= last) { row.remove(); this.shown.delete(index); }
    const offset = this.scale < 1 ? this.box.scrollTop - this.first * ROW : 0;
    for (let index = first; index < last; index++) {
      let row = this.shown.get(index);
      if (!row) {
        row = this.draw(index);
        this.shown.set(index, row);
        this.space.append(row);
      }
      row.style.top = `${index * ROW + offset}px`;
    }
  }
  show(index) {
    if (index < 0) return;
    const top = this.first, inside = Math.floor(this.box.clientHeight / ROW);
    if (index > top && index < top + inside - 2) return;
    this.box.scrollTop = Math.max(index - Math.floor(inside / 3), 0) * ROW * this.scale;
    this.paint();
  }
}

// A table: columns `{title, width, number, mono, value(row), text(row), bar(row)}`; `width` is a number of pixels or a share "2fr".
class Table {
  constructor(columns, rows, { choose, isNow, label, sort, empty }) {
    this.columns = columns;
    this.given = rows;
    this.rows = rows;
    this.choose = choose || (() => {});
    this.isNow = isNow || (() => false);
    this.now = -1;
    this.titles = make("div", { className: "titles", role: "row" });
    this.box = make("div", { className: "list", role: "listbox", tabIndex: 0, "aria-label": label });
    this.element = make("div", { className: "grid" }, this.titles, this.box);
    if (!rows.length) {
      this.element = make("p", { className: "empty" }, empty || "Nothing.");
      return;
    }
    this.list = new Rows(this.box, (index) => this.draw(index));
    columns.forEach((column, number) => {
      const title = make("button", { type: "button", className: column.number ? "number" : "", title: `Sort by ${column.title}`, onclick: () => this.sort(number) }, column.title);
      this.size(title, column);
      this.titles.append(title);
    });
    this.box.addEventListener("keydown", (event) => this.key(event));
    if (sort !== undefined) this.sort(sort); else this.list.set(rows.length);
  }
  size(cell, column) {
    if (typeof column.width === "number") cell.style.width = `${column.width}px`;
    else { cell.style.flex = `${parseFloat(column.width)} 1 0`; cell.style.minWidth = "0"; }
  }
  sort(number) {
    const column = this.columns[number], again = this.sorted === number;
    const sign = again ? -this.sign : column.number ? -1 : 1;
    this.sorted = number;
    this.sign = sign;
    const key = column.value || column.text;
    const order = (a, b) => (typeof a === "string" || typeof b === "string" ? String(a).localeCompare(String(b)) : a - b);
    this.rows = this.given.map((row, at) => [row, at]).sort((a, b) => sign * order(key(a[0]), key(b[0])) || a[1] - b[1]).map(([row]) => row);
    [...this.titles.children].forEach((title, at) => { title.textContent = this.columns[at].title + (at === number ? (sign > 0 ? " ↑" : " ↓") : ""); });
    this.list.set(this.rows.length);
    this.box.scrollTop = 0;
  }
  draw(index) {
    const row = this.rows[index], now = this.isNow(row);
    const element = make("div", { className: `row${now ? " now" : ""}`, role: "option", "aria-selected": String(now), "aria-posinset": String(index + 1), "aria-setsize": String(this.rows.length), onclick: () => this.pick(index) });
    for (const column of this.columns) {
      const text = visible(column.text(row));
      const cell = make("span", { className: `cell${column.number ? " number" : ""}${column.mono ? " mono" : ""}`, title: text });
      cell.textContent = text;
      if (column.bar) {
        cell.classList.add("bars");
        const bar = make("i");
        bar.style.width = `calc(${(Math.min(column.bar(row), 1) * 100).toFixed(1)}% - 8px)`;
        cell.append(bar);
      }
      this.size(cell, column);
      element.append(cell);
    }
    return element;
  }
  pick(index) {
    this.now = index;
    this.choose(this.rows[index]);
    this.refresh();
  }
  key(event) {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 20, PageUp: -20, Home: -1e9, End: 1e9 }[event.key];
    if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.pick(Math.min(Math.max(this.now + step, 0), this.rows.length - 1));
    this.list.show(this.now);
  }
  refresh() { if (this.list) this.list.refresh(); }
}

// Once something is chosen with the pointer, keys are the page's again; those who walk a chooser by keys stay in it.
function releaseAfterPointer(chooser) {
  let pressed = false;
  chooser.addEventListener("pointerdown", () => { pressed = true; });
  chooser.addEventListener("keydown", () => { pressed = false; });
  chooser.addEventListener("change", () => { if (pressed) chooser.blur(); });
}
