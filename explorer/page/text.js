// The program's text, as it is or as what changed, with one row for each line in sight.

const TOKEN = /("(?:[^"\\]|\\.)*")|(%(?:"(?:[^"\\]|\\.)*"|[\w.]+))|(@(?:"(?:[^"\\]|\\.)*"|[\w.]+))|(\b(?:aten|gw|sym|prims|builtin)\.[\w.]+)|(\b(?:f|bf|i|u|c)\d+(?:e\w+)?(?:\[[^\]]*\])?|\bbool\[[^\]]*\])|(\b\d+(?:\.\d+)?(?:e[-+]?\d+)?\b)/g;
const TOKEN_CLASS = [null, "n", "v", "w", "o", "t", "n"];
const MARKER_CLASS = { "-": "remove", "+": "add", ">": "move", "<": "move", "~": "move" };
const AROUND = 3;
const MANY_WEIGHTS = 6;
const WIDEST = 4000; // characters of a line that are shown in its row; all of it is in the pane of the line

const textPane = { rows: [], list: null, opened: new Set(), at: new Map() };

function coloured(text) {
  const [code, ...comment] = text.split("  # ");
  const parts = [];
  let from = 0;
  for (const match of code.matchAll(TOKEN)) {
    if (match.index > from) parts.push(visible(code.slice(from, match.index)));
    const kind = TOKEN_CLASS[match.findIndex((group, number) => number && group !== undefined)];
    parts.push(make("span", { className: kind }, match[0]));
    from = match.index + match[0].length;
  }
  parts.push(visible(code.slice(from)));
  if (comment.length) parts.push(make("span", { className: "c" }, `  # ${comment.join("  # ")}`));
  return parts;
}

function startText() {
  const box = byId("text");
  textPane.list = new Rows(box, drawRow);
  box.addEventListener("keydown", textKey);
  for (const button of document.querySelectorAll("[data-mode]")) button.addEventListener("click", () => change({ mode: button.dataset.mode }));
  releaseAfterPointer(byId("function"));
  byId("function").addEventListener("change", (event) => {
    const fn = Number(event.target.value);
    change({ fn, selected: nowProgramFunctions()[fn].first, lit: new Set() });
  });
  onChange((names) => {
    if (names.has("stage") || names.has("mode")) fillText();
    else textPane.list.refresh();
    if (names.has("stage") || names.has("mode") || names.has("selected")) showSelected();
    if (names.has("stage") || names.has("fn") || names.has("mode")) fillTextBar();
  });
  fillText();
  fillTextBar();
}

const nowProgramFunctions = () => report.data.programs[nowProgram()].functions;

function fillText() {
  const difference = nowDifference();
  textPane.rows = difference ? differenceRows(difference) : plainRows();
  textPane.at = new Map();
  textPane.rows.forEach((row, number) => { if (row.after >= 0 && !row.gap) textPane.at.set(row.after, number); });
  const longest = textPane.rows.reduce((most, row) => Math.max(most, Math.min(row.text.length, WIDEST)), 0);
  textPane.list.set(textPane.rows.length, longest);
}

// Every line; a long table of weights is one row that opens it.
function plainRows() {
  const lines = nowLines(), rows = lines.map((line, place) => ({ marker: " ", before: -1, after: place, text: line.text }));
  const first = lines.findIndex((line) => line.kind === "weight");
  let end = first;
  while (end >= 0 && end < lines.length && lines[end].kind === "weight") end++;
  if (end - first < MANY_WEIGHTS || textPane.opened.has(first)) return rows;
  return [...rows.slice(0, first), { gap: first, marker: "", before: -1, after: -1, text: `… ${counted(end - first, "weight")}` }, ...rows.slice(end)];
}

function nowDifference() {
  if (state.mode === "text") return null;
  const after = nowProgram();
  const before = state.mode === "captured" ? 0 : Math.max(programOf(Math.max(state.stage - 1, 0)), 0);
  if (before === after) return { rows: linesOf(after).map((line, place) => [" ", place, place, 1, null]), before, after, said: "nothing changed", changed: [] };
  return differenceOf(before, after);
}

// The rows around changes; what lies between is one row that opens it.
function differenceRows(difference) {
  const before = linesOf(difference.before), after = linesOf(difference.after), rows = [];
  for (const [marker, i, j, count, text] of difference.rows) {
    for (let k = 0; k < count; k++) {
      const one = i < 0 ? -1 : i + k, other = j < 0 ? -1 : j + k;
      rows.push({ marker, before: one, after: other, text: text ?? (other >= 0 ? after[other] : before[one]).text });
    }
  }
  const shown = [];
  for (let at = 0; at < rows.length;) {
    let end = at;
    while (end < rows.length && rows[end].marker === " ") end++;
    const first = at === 0 ? 0 : at + AROUND, last = end === rows.length ? end : end - AROUND;
    if (last - first > 2 && !textPane.opened.has(rows[first].after)) {
      shown.push(...rows.slice(at, first), { gap: rows[first].after, marker: "", before: -1, after: -1, text: `… ${counted(last - first, "line")} as before` }, ...rows.slice(last, end));
    } else shown.push(...rows.slice(at, end));
    while (end < rows.length && rows[end].marker !== " ") shown.push(rows[end++]);
    at = end;
  }
  return shown;
}

function fillTextBar() {
  for (const button of document.querySelectorAll("[data-mode]")) {
    button.setAttribute("aria-checked", String(button.dataset.mode === state.mode));
    button.disabled = state.stage === 0 && button.dataset.mode !== "text";
  }
  document.querySelector('[data-mode="captured"]').hidden = !hasCaptured(state.stage);
  const chooser = byId("function"), functions = nowProgramFunctions();
  chooser.replaceChildren(...functions.map((each, number) => make("option", { value: String(number), selected: number === state.fn }, each.name)));
  chooser.hidden = functions.length < 2;
  const difference = nowDifference();
  byId("said").textContent = difference ? difference.said : counted(nowLines().filter((line) => line.kind === "call").length, "call");
  byId("said").title = byId("said").textContent;
}

function drawRow(number) {
  const row = textPane.rows[number], place = row.after;
  if (row.gap !== undefined) {
    return make("div", { className: "row gap", role: "option", onclick: () => openGap(row.gap) }, make("span", { className: "gutter" }), make("span", { className: "marker" }), row.text);
  }
  const isNow = place >= 0 && place === state.selected;
  const classes = ["row", MARKER_CLASS[row.marker] || ""];
  if (isNow) classes.push("now");
  else if (place >= 0 && nearSelected(place)) classes.push("near");
  if (state.lit.has(place)) classes.push("lit");
  if (isMatch(place)) classes.push("match");
  return make(
    "div",
    { className: classes.filter(Boolean).join(" "), role: "option", id: `row-${number}`, "aria-selected": String(isNow), "aria-posinset": String(number + 1), "aria-setsize": String(textPane.rows.length), "data-line": String(place), onclick: () => clickRow(row) },
    make("span", { className: "gutter" }, String((place >= 0 ? place : row.before) + 1)),
    make("span", { className: "marker" }, row.marker === " " ? "" : row.marker),
    make("span", {}, coloured(row.text.length > WIDEST ? `${row.text.slice(0, WIDEST)}…` : row.text)),
  );
}

const isMatch = (place) => state.query && place >= 0 && nowLines()[place].text.toLowerCase().includes(state.query.trim().toLowerCase());

// Lines that the selected one reads, and those that read it.
function nearSelected(place) {
  if (state.selected < 0) return false;
  const line = nowLines()[state.selected];
  return Boolean((line.reads && line.reads.includes(place)) || (nowLines()[place].reads || []).includes(state.selected));
}

function clickRow(row) {
  if (row.after >= 0) selectLine(row.after);
  else selectLine(row.before, state.mode === "captured" ? 0 : programOf(state.stage - 1));
}

function openGap(first) {
  textPane.opened.add(first);
  fillText();
}

function showSelected() {
  if (state.selected < 0) return;
  let number = textPane.at.get(state.selected);
  if (number === undefined) { // it lies in a gap
    const gap = textPane.rows.filter((row) => row.gap !== undefined && row.gap <= state.selected).pop();
    if (!gap) return;
    openGap(gap.gap);
    number = textPane.at.get(state.selected);
    if (number === undefined) return;
  }
  textPane.list.show(number);
  byId("text").setAttribute("aria-activedescendant", `row-${number}`);
}

function textKey(event) {
  const page = textPane.list.visibleRows - 3;
  const step = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 }[event.key];
  if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  event.stopPropagation();
  const rows = textPane.rows;
  let number = Math.min(Math.max((textPane.at.get(state.selected) ?? textPane.list.first) + step, 0), rows.length - 1);
  const way = step > 0 ? 1 : -1;
  while (rows[number] && rows[number].after < 0) number += way;
  if (rows[number]) selectLine(rows[number].after);
}
