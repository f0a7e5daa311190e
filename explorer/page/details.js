// What is known of the selected line, and the user's source around the line that it came from.

const NO_SOURCE = ["No line of your source is known.", "The program came from a file that names none, or is made of torch's own modules."].map((text) => ({ number: 0, text }));
const sourcePane = { rows: [], list: null, file: "" };

function startDetails() {
  sourcePane.list = new Rows(byId("source"), drawSourceRow);
  for (const name of ["line", "source"]) byId(`tab-${name}`).addEventListener("click", () => change({ below: name }));
  byId("below").querySelector('[role="tablist"]').addEventListener("keydown", tabKeys);
  onChange((names) => {
    if (names.has("below")) showBelow();
    if (names.has("stage") || names.has("selected") || names.has("lit")) { fillDetails(); fillSource(); }
  });
  showBelow();
  fillDetails();
  fillSource();
}

function showBelow() {
  for (const name of ["line", "source"]) {
    byId(name).hidden = state.below !== name;
    setTab(byId(`tab-${name}`), state.below === name);
  }
  if (state.below === "source") { sourcePane.list.refresh(); showSourceLine(); }
}

function setTab(tab, isNow) {
  tab.setAttribute("aria-selected", String(isNow));
  tab.tabIndex = isNow ? 0 : -1;
}

function tabKeys(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const tabs = [...event.currentTarget.querySelectorAll('[role="tab"]')];
  const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
  next.focus();
  next.click();
  event.preventDefault();
  event.stopPropagation();
}

const lineLink = (place, program = nowProgram()) => {
  const line = linesOf(program)[place];
  const text = line.kind === "weight" ? nameOf(line) : `${nameOf(line)} ${shortOp(line.op)}`;
  return make("button", { type: "button", className: "link mono", title: visible(line.text.trim()), onclick: () => selectLine(place, program) }, text);
};

function fact(list, name, ...content) {
  list.append(make("dt", {}, name), make("dd", {}, ...content));
}

function fillDetails() {
  const box = byId("line");
  box.replaceChildren();
  if (state.selected < 0) {
    box.append(make("p", { className: "empty" }, "Choose a line of the text, a box of the graph or a tensor of the memory curve: what it reads, where it comes from, what it costs and which rewrite made it stand here."));
    return;
  }
  const place = state.selected, line = nowLines()[place], index = report.index[nowProgram()], facts = make("dl", { className: "facts" });
  box.append(make("code", { className: "full mono" }, coloured(line.text.trim())), facts);
  const where = whereOf(line);
  if (where) {
    if (where.module) fact(facts, "module", where.module);
    if (where.file) fact(facts, "user's line", make("button", { type: "button", className: "link mono", onclick: () => change({ below: "source" }) }, `${where.file}:${where.line}`));
  }
  if (line.reads) fact(facts, "reads", chips(line.reads));
  const users = index.users.get(place);
  if (users) fact(facts, "read by", chips(users));
  if (line.bytes) fact(facts, "storage", bytes(line.bytes), lifeOf(place));
  costs(facts, place);
  history(facts, place, line);
  if (line.region !== undefined) fact(facts, "in region", lineLink(line.region));
}

function chips(places) {
  const shown = places.slice(0, 24).map((place) => lineLink(place));
  return make("span", { className: "chips" }, shown, places.length > 24 ? `and ${places.length - 24} more` : null);
}

function lifeOf(place) {
  const held = report.index[nowProgram()].storage.get(place);
  if (!held) return ", shared with what it is a view of";
  const { memory } = nowFunction(), atPeak = held.born <= memory.peak_at && memory.peak_at <= held.dies;
  return `, live from call ${held.born + 1} to ${Math.min(held.dies + 1, memory.live.length)} of ${memory.live.length}${atPeak ? ", at the peak among them" : ""}`;
}

function costs(facts, place) {
  if (!isLast(nowProgram())) return;
  const kernel = report.kernels.get(place), error = report.errors.get(place);
  if (kernel && kernel.kernel.seconds !== null) {
    const rate = kernel.seconds ? `, ${(kernel.bytes / kernel.seconds / 1e9).toFixed(1)} GB/s` : "";
    const shared = kernel.kernel.lines.length > 1 ? ` (its part of one kernel of ${kernel.kernel.lines.length} calls)` : "";
    fact(facts, "time", `${seconds(kernel.seconds)}, ${bytes(Math.round(kernel.bytes))} moved${rate}${shared}`);
  }
  if (error) fact(facts, "error", `${scientific(error.after)} against float64; ${scientific(error.before)} as captured`);
}

// The rewrites that put a line where it is, and the line in the stages beside this one.
function history(facts, place, line) {
  const stage = report.data.stages[state.stage];
  for (const record of stage.records.filter((each) => each.after.some((named) => named.line === place)).slice(0, 4)) {
    fact(facts, "made by", `${stage.name}: ${record.rule}  `, make("span", { className: "quiet" }, `${record.file}:${record.line}`));
  }
  const next = report.data.stages[state.stage + 1];
  for (const record of next ? next.records.filter((each) => each.before.some((named) => named.line === place)).slice(0, 2) : []) {
    fact(facts, "taken by", make("button", { type: "button", className: "link", onclick: () => selectStage(state.stage + 1) }, `${next.name}: ${record.rule}`));
  }
  const program = nowProgram();
  if (program > 0) {
    const earlier = sameLine(program, place, program - 1);
    if (earlier >= 0) fact(facts, "before", lineLink(earlier, program - 1));
    else if (line.kind === "call") fact(facts, "before", "not there");
  }
  if (!isLast(program)) {
    const later = sameLine(program, place, program + 1);
    if (later >= 0) fact(facts, "after", lineLink(later, program + 1));
    else if (line.kind === "call") fact(facts, "after", "no longer there");
  }
  for (const left of report.data.stages.flatMap((each) => (programBefore(each) === program ? each.left.filter((one) => one.line === place).map((one) => [each, one]) : [])).slice(0, 4)) {
    fact(facts, "left alone", `by ${left[0].name}: ${left[1].reason}`);
  }
  if (line.origin) fact(facts, "captured as", `operation ${line.origin.slice(0, 12).join(", ")}${line.origin.length > 12 ? ", …" : ""}`);
}

function programBefore(stage) {
  const number = report.data.stages.indexOf(stage);
  return number > 0 ? programOf(number - 1) : -1;
}

// --- source ---

function fillSource() {
  const where = state.selected >= 0 ? whereOf(nowLines()[state.selected]) : null;
  const file = where && where.file ? where.file : sourcePane.file || Object.keys(report.data.sources)[0] || "";
  const runs = Object.hasOwn(report.data.sources, file) ? report.data.sources[file] : [];
  sourcePane.file = file;
  sourcePane.now = where && where.file === file ? where.line : -1;
  sourcePane.rows = !file ? NO_SOURCE : runs.flatMap((run, n) => [...(n ? [{ number: 0, text: "⋯" }] : []), ...run.lines.map((text, at) => ({ number: run.first + at, text }))]);
  byId("file").textContent = file ? visible(file) + (runs.length ? "" : "  (its text was not found)") : "";
  const longest = sourcePane.rows.reduce((most, row) => Math.max(most, row.text.length), 0);
  sourcePane.list.set(sourcePane.rows.length, longest);
  showSourceLine();
}

const showSourceLine = () => sourcePane.list.show(sourcePane.rows.findIndex((row) => row.number === sourcePane.now && row.number));

function drawSourceRow(index) {
  const { number, text } = sourcePane.rows[index];
  const places = number ? report.index[nowProgram()].byWhere.get(`${sourcePane.file}:${number}`) : null;
  const classes = `row${number && number === sourcePane.now ? " now" : ""}${places ? " near" : ""}`;
  const attributes = places ? { title: `${counted(places.length, "line")} of the program came from here`, onclick: () => selectSource(sourcePane.file, number) } : {};
  const row = make("div", { className: places && number !== sourcePane.now ? "row near" : classes, ...attributes }, make("span", { className: "gutter" }, number ? String(number) : ""), make("span", { className: "marker quiet" }, places ? String(places.length) : ""), text);
  if (places) row.style.cursor = "pointer";
  return row;
}
