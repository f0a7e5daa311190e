// What is selected. Everything that shows it listens; nothing else is shared.

const state = { stage: 0, mode: "text", fn: 0, selected: -1, lit: new Set(), query: "", matches: [], match: -1, dock: "memory", below: "line" };
const listeners = [];

const onChange = (listener) => listeners.push(listener);

// `changes` are fields of the state; listeners get the names of those that differ.
function change(changes) {
  const names = new Set(Object.keys(changes).filter((name) => state[name] !== changes[name]));
  if (!names.size) return;
  Object.assign(state, changes);
  for (const listener of listeners) listener(names);
}

const nowProgram = () => programOf(state.stage);
const nowLines = () => linesOf(nowProgram());
const nowFunction = () => report.data.programs[nowProgram()].functions[state.fn];

// What changed since capture is known of the last program alone, and the captured one has no change at all.
const hasCaptured = (stage) => isLast(programOf(stage)) && report.data.programs.length > 2;
const modeAt = (stage) => (stage === 0 ? "text" : state.mode === "captured" && !hasCaptured(stage) ? "previous" : state.mode);

function selectStage(stage) {
  stage = Math.min(Math.max(stage, 0), report.data.stages.length - 1);
  const from = nowProgram(), to = programOf(stage);
  const selected = state.selected < 0 ? -1 : sameLine(from, state.selected, to);
  const name = nowFunction().name;
  const fn = Math.max(report.data.programs[to].functions.findIndex((each) => each.name === name), 0);
  change({ stage, selected, fn, lit: new Set(), mode: modeAt(stage), ...found(state.query, to) });
}

// Selects a line of `program`, in the first stage that has it where the present one has another.
function selectLine(place, program = nowProgram(), lit = new Set()) {
  if (place < 0) return;
  const stage = program === nowProgram() ? state.stage : report.data.stages.findIndex((each) => each.program === program);
  const others = stage === state.stage ? {} : found(state.query, program);
  change({ stage, mode: modeAt(stage), selected: place, fn: functionAt(program, place), lit, below: state.below, ...others });
}

// A line of the user's: all that came from it is lit, and the first of it selected.
function selectSource(file, number) {
  const places = report.index[nowProgram()].byWhere.get(`${file}:${number}`);
  if (places) selectLine(places.includes(state.selected) ? state.selected : places[0], nowProgram(), new Set(places));
}

function found(query, program) {
  const text = query.trim().toLowerCase(), matches = [];
  if (text) linesOf(program).forEach((line, place) => { if (line.text.toLowerCase().includes(text)) matches.push(place); });
  return { query, matches, match: -1 };
}

function nextMatch(step) {
  const count = state.matches.length;
  if (!count) return;
  let match = state.match < 0 ? (step > 0 ? state.matches.findIndex((place) => place >= state.selected) : count - 1) : state.match + step;
  match = (Math.max(match, match === -1 && state.match < 0 ? 0 : match) + count) % count;
  change({ match, selected: state.matches[match], fn: functionAt(nowProgram(), state.matches[match]), lit: new Set() });
}
