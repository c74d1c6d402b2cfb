"use strict";
/* Tables that sort by a click on a heading, filter as one types, and, of modules, fold. */

const LIMIT_ROWS = 300;

/* A column: heading, the value to sort by, the value as [number, unit], and what else belongs in the cell. */
const number = (label, value, format, more = {}) => ({ label, value, format, ...more });
const timeShare = (seconds) => (seconds === null || !whole()[SECONDS] ? null : seconds / whole()[SECONDS]);
const counted = (value) => (value === null ? null : [value.toLocaleString("en"), ""]);
const some = (value) => value || null;

function meter(share) {
  const bar = element("i");
  bar.style.width = `${Math.min(100, 100 * (share || 0))}%`;
  const frame = element("span", { className: "meter" }, bar);
  frame.setAttribute("aria-hidden", "true");
  return frame;
}

function verdict(c) {
  const bound = c[BOUND];
  return bound ? [element("span", { className: `bound-${bound}` }, element("span", { className: "dot" }), VERDICTS[bound])] : ["–"];
}

function moduleColumns() {
  const of = (whose, pick) => (row) => pick(cell(row, whose));
  const share = (row) => timeShare(cell(row, "total")[SECONDS]);
  return [
    ...(data.timed ? [
      number("Time", of("total", (c) => c[SECONDS]), duration),
      number("Share", share, percent, { after: (row) => meter(share(row)) }),
      number("Own time", of("own", (c) => some(c[SECONDS])), duration),
    ] : []),
    ...(data.judged && data.timed ? [number("Of roofline", of("total", efficiency), percent)] : []),
    ...(data.judged ? [number("Bound by", of("total", (c) => c[BOUND]), null, { nodes: (row) => verdict(cell(row, "total")), text: true })] : []),
    number("Operations", of("total", (c) => some(c[FLOPS])), (v) => quantity(v, "FLOP")),
    ...(data.executes ? [number("Executed", of("total", (c) => some(c[EXECUTED])), (v) => quantity(v, "FLOP"))] : []),
    ...(data.timed ? [number("Speed", of("total", rate), (v) => quantity(v, "FLOP/s"))] : []),
    number("Traffic", of("total", (c) => some(c[BYTES])), (v) => quantity(v, "B")),
    number("Ops a byte", of("total", intensity), (v) => quantity(v)),
    ...(data.judged ? [number("Least time", of("total", (c) => some(c[LIMIT])), duration)] : []),
    number("Parameters", (row) => some(row.parameters), (v) => quantity(v)),
    number("Activations", (row) => some(row.activations), (v) => quantity(v, "B")),
    number("Calls", (row) => some(row.calls), counted),
  ];
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "string" ? a.localeCompare(b) : a - b;
}

/* Rows by a column; those without a value last, whichever way. */
function sorted(rows, columns, order) {
  if (!order) return rows;
  const value = order.column < 0 ? (row) => row.label || row.name : columns[order.column].value;
  return rows
    .map((row) => [value(row), row])
    .sort(([a], [b]) => (a === null || b === null ? compare(a, b) : order.way * compare(a, b)))
    .map(([, row]) => row);
}

class Table {
  constructor(name, title, columns, view) {
    Object.assign(this, { name, title, columns, view, order: null, all: false });
    this.table = byId(`${name}-table`);
    this.more = byId(`${name}-more`);
    this.body = element("tbody");
    this.table.replaceChildren(this.head(), this.body);
    this.filter = byId(`${name}-filter`);
    /* A thousand rows at every key would be slow. */
    this.filter.addEventListener("input", () => { this.all = false; this.show(); });
    this.more.addEventListener("click", () => { this.all = true; this.show(); });
    listeners.push(() => this.show());
  }

  head() {
    const headings = [{ label: this.title, text: true }, ...this.columns].map((column, index) => {
      const button = element("button", { type: "button", textContent: column.label });
      const heading = element("th", { scope: "col", className: column.text ? "text" : "" }, button);
      button.addEventListener("click", () => this.sortBy(index - 1));
      return heading;
    });
    this.headings = headings;
    return element("thead", {}, element("tr", {}, ...headings));
  }

  /* First click: largest first, or A to Z; second: the other way; third: as it was. */
  sortBy(column) {
    const first = column < 0 || this.columns[column].text ? 1 : -1;
    const same = this.order && this.order.column === column;
    this.order = !same ? { column, way: first } : this.order.way === first ? { column, way: -first } : null;
    this.show();
  }

  show() {
    this.headings.forEach((heading, index) => {
      const ours = this.order && this.order.column === index - 1;
      if (ours) heading.setAttribute("aria-sort", this.order.way > 0 ? "ascending" : "descending");
      else heading.removeAttribute("aria-sort");
    });
    const entries = this.view(this, this.filter.value.trim().toLowerCase());
    const shown = this.all ? entries : entries.slice(0, LIMIT_ROWS);
    this.write(shown);
    if (!entries.length) this.body.append(element("tr", {}, element("td", { className: "empty", colSpan: this.headings.length, textContent: "Nothing here." })));
    this.more.hidden = shown.length === entries.length;
    this.more.textContent = `Show all ${entries.length.toLocaleString("en")} rows`;
    byId(`${this.name}-count`).textContent = this.all || shown.length === entries.length ? `${entries.length.toLocaleString("en")} rows` : `${LIMIT_ROWS} of ${entries.length.toLocaleString("en")} rows`;
  }

  /* Units of a column are as wide as its longest, so that numbers stand below each other. */
  write(entries) {
    const columns = this.columns.map((column) => {
      if (column.nodes) return entries.map(({ row }) => element("td", { className: "text" }, ...column.nodes(row)));
      const parts = entries.map(({ row }) => column.format(column.value(row)) || ["–", ""]);
      const width = `${0.76 * Math.max(0, ...parts.map(([, unit]) => unit.length))}em`;
      return entries.map(({ row }, index) => {
        const unit = element("span", { className: "unit-s", textContent: parts[index][1] });
        unit.style.minWidth = width;
        return element("td", {}, parts[index][0], unit, ...(column.after ? [column.after(row)] : []));
      });
    });
    this.body.replaceChildren(...entries.map(({ row, first }, index) => {
      const head = element("th", { scope: "row", title: row.name }, ...first);
      return element("tr", {}, head, ...columns.map((cells) => cells[index]));
    }));
  }
}

/* ---- modules: a tree, or a flat list ---- */

const below = data.modules.map(() => []);
data.modules.forEach((row, index) => { row.index = index; if (row.parent >= 0) below[row.parent].push(row); });
const open = new Set();
const looks = { view: "tree" };

/* Levels are opened from the top as long as everything fits on a screen or two. */
function unfold(most) {
  open.clear();
  let level = [data.modules[0]], count = 1;
  while (level.length) {
    const next = level.flatMap((row) => below[row.index]);
    if (count + next.length > most) break;
    level.filter((row) => below[row.index].length).forEach((row) => open.add(row.index));
    count += next.length;
    level = next;
  }
}

const kindOf = (row) => (row.kind ? [element("span", { className: "kind", textContent: row.kind })] : []);

function flatModules(table, wanted) {
  const rows = data.modules.filter((row) => `${row.name} ${row.kind}`.toLowerCase().includes(wanted));
  return sorted(rows, table.columns, table.order).map((row) => ({ row, first: [row.name, ...kindOf(row)] }));
}

function treeModules(table) {
  const entries = [];
  const visit = (row, depth) => {
    const unfolded = open.has(row.index);
    let fold = element("span", { className: "leaf" });
    if (below[row.index].length) {
      fold = element("button", { type: "button", className: "fold", ariaLabel: row.name });
      fold.setAttribute("aria-expanded", String(unfolded));
      fold.addEventListener("click", () => {
        if (!open.delete(row.index)) open.add(row.index);
        table.show();
        table.body.querySelectorAll("tr")[entries.findIndex((entry) => entry.row === row)]?.querySelector(".fold").focus();
      });
    }
    const indent = element("span", { className: "indent" });
    indent.style.setProperty("--depth", depth);
    entries.push({ row, first: [indent, fold, row.label, ...kindOf(row)] });
    if (unfolded) sorted(below[row.index], table.columns, table.order).forEach((child) => visit(child, depth + 1));
  };
  visit(data.modules[0], 0);
  return entries;
}

const inPhase = (entries) => entries.filter(({ row }) => row.index === 0 || row.total[state.phase]);
const moduleView = (table, wanted) => inPhase(looks.view === "flat" || wanted ? flatModules(table, wanted) : treeModules(table));

unfold(80);
const moduleTable = new Table("module", "Module", moduleColumns(), moduleView);
choice("module-view", (key) => { looks.view = key; moduleTable.show(); });
byId("module-fold").addEventListener("click", (event) => {
  if (!event.target.value) return;
  unfold(Number(event.target.value));
  moduleTable.show();
});
moduleTable.show();

/* ---- operators and kernels ---- */

const plainView = (rows) => (table, wanted) => {
  const here = rows.filter((row) => row.cells[state.phase] && row.name.toLowerCase().includes(wanted));
  return sorted(here, table.columns, table.order).map((row) => ({ row, first: [element("span", { className: "mono", textContent: row.name }), ...(row.unknown ? [element("span", { className: "kind", textContent: "no cost known" })] : [])] }));
};
const at = (index) => (row) => row.cells[state.phase][index];
const partOf = (row) => timeShare(at(0)(row));
const timeColumns = [number("Time", at(0), duration), number("Share", partOf, percent, { after: (row) => meter(partOf(row)) })];

const operatorsTimed = data.operators.some((row) => row.cells.all && row.cells.all[0] !== null);
const operatorTable = new Table("operator", "Operator", [
  ...(operatorsTimed ? timeColumns : []),
  number("Calls", at(1), counted),
  number("Operations", (row) => some(at(2)(row)), (v) => quantity(v, "FLOP")),
  ...(data.executes ? [number("Executed", (row) => some(at(3)(row)), (v) => quantity(v, "FLOP"))] : []),
  number("MACs", (row) => some(at(4)(row)), (v) => quantity(v)),
  number("Traffic", (row) => some(at(5)(row)), (v) => quantity(v, "B")),
], plainView(data.operators));
operatorTable.sortBy(operatorsTimed ? 0 : 1);

if (data.kernels.length) {
  const kernelTable = new Table("kernel", "Kernel", [...timeColumns, number("Launches", at(1), counted)], plainView(data.kernels));
  kernelTable.sortBy(0);
}
