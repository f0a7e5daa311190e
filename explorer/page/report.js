// The document, and what is looked up in it: lines by user's line, users of a line, the same line in another stage, figures of a line.

const report = { data: null, index: [], kernels: new Map(), errors: new Map() };

// Text of models is shown, never interpreted; what would change the order or the number of lines on the screen is spelled out.
const INVISIBLE = /[\u0000-\u0008\u000a-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const visible = (text) => String(text).replace(INVISIBLE, (c) => `\\u{${c.charCodeAt(0).toString(16)}}`);

async function readData() {
  const packed = document.getElementById("data").textContent.trim();
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function prepare(data) {
  report.data = data;
  report.index = data.programs.map((program) => indexOf(data, program));
  for (const kernel of data.kernels) {
    for (const line of kernel.lines) {
      const known = report.kernels.get(line) || { seconds: 0, bytes: 0, kernel };
      // The time of a kernel of several calls belongs to all of them alike.
      known.seconds += asNumber(kernel.seconds) / kernel.lines.length;
      known.bytes += kernel.bytes / kernel.lines.length;
      report.kernels.set(line, known);
    }
  }
  for (const error of data.errors) if (error.line >= 0) report.errors.set(error.line, error);
}

const asNumber = (value) => (value === "inf" ? Infinity : value === "-inf" ? -Infinity : value === "nan" ? NaN : value || 0);

function indexOf(data, program) {
  const users = new Map(), byWhere = new Map(), storage = new Map();
  program.lines.forEach((line, place) => {
    for (const read of line.reads || []) {
      if (!users.has(read)) users.set(read, []);
      users.get(read).push(place);
    }
    if (line.where === undefined) return;
    const key = placeKey(data.wheres[line.where]);
    if (!byWhere.has(key)) byWhere.set(key, []);
    byWhere.get(key).push(place);
  });
  for (const fn of program.functions) for (const each of fn.memory.storages) {
    const known = storage.get(each.line);
    if (!known || known.bytes < each.bytes) storage.set(each.line, each); // of several results the largest
  }
  return { users, byWhere, storage };
}

const placeKey = (where) => `${where.file}:${where.line}`;
const programOf = (stage) => report.data.stages[stage].program;
const linesOf = (program) => report.data.programs[program].lines;
const whereOf = (line) => (line.where === undefined ? null : report.data.wheres[line.where]);
const differenceOf = (before, after) => report.data.differences.find((each) => each.before === before && each.after === after);
const isLast = (program) => program === report.data.programs.length - 1;

function functionAt(program, place) {
  const all = report.data.programs[program].functions;
  return Math.max(all.findIndex((each) => each.first <= place && place <= each.last), 0);
}

// The name of a line's value, or of what the line declares.
function nameOf(line) {
  const text = line.text.trim();
  if (line.kind === "input") return text.split(" ")[1] || "input";
  if (line.kind === "weight") return text.split(" ")[1] || "weight";
  if (line.kind === "function") return text.split(" ")[1];
  return line.kind === "call" ? text.split(" = ")[0] : line.kind;
}

function typeOf(line) {
  const code = line.text.split("  # ")[0];
  const at = code.lastIndexOf(" : ");
  return at < 0 ? "" : code.slice(at + 3).replace(/ \{$/, "");
}

// The sizes that figures of a function are for, where a call decides them: " at batch=2, length=9".
function sizesOf(program, fn) {
  const lines = linesOf(program), { first, last } = report.data.programs[program].functions[fn];
  const words = new Set(lines.slice(first, last + 1).filter((line) => line.kind === "input").flatMap((line) => typeOf(line).split(/[^\w.]+/)));
  const known = lines.filter((line) => line.kind === "symbol").map((line) => /^symbol (\S+) .*hint (\d+)/.exec(line.text)).filter((match) => match && words.has(match[1]));
  return known.length ? ` at ${known.map((match) => `${match[1]}=${match[2]}`).join(", ")}` : "";
}

// --- the same line in another program ---

function partners(difference) {
  if (difference.partners) return difference.partners;
  const forth = new Map(), back = new Map();
  const pair = (i, j) => { forth.set(i, j); back.set(j, i); };
  for (const [, before, after, count] of difference.rows) {
    if (before >= 0 && after >= 0) for (let k = 0; k < count; k++) pair(before + k, after + k);
  }
  for (const [i, j] of difference.changed) pair(i, j);
  return (difference.partners = { forth, back });
}

// -1 where the line is in one of the two alone.
function sameLine(from, place, to) {
  for (let program = from; program < to; program++) {
    place = place < 0 ? -1 : partners(differenceOf(program, program + 1)).forth.get(place) ?? -1;
  }
  for (let program = from; program > to; program--) {
    place = place < 0 ? -1 : partners(differenceOf(program - 1, program)).back.get(place) ?? -1;
  }
  return place;
}

// --- as text ---

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let value = count, unit = 0;
  while (Math.abs(value) >= 1024 && unit < units.length - 1) { value /= 1024; unit++; }
  return unit ? `${twoPlaces(value)} ${units[unit]}` : `${value} B`;
}

// As Python rounds, so that the report in words says the same: of two that are as near, the even one.
function twoPlaces(value) {
  const hundredths = value * 100, below = Math.floor(hundredths);
  return (hundredths - below === 0.5 ? (below + (below % 2)) / 100 : value).toFixed(2);
}

function seconds(value) {
  if (value === null || value === undefined) return "";
  const number = asNumber(value);
  if (number >= 1) return `${number.toFixed(2)} s`;
  return number >= 1e-3 ? `${(number * 1e3).toFixed(2)} ms` : `${(number * 1e6).toFixed(1)} µs`;
}

const scientific = (value) => (value === null || value === undefined ? "" : typeof value === "number" ? value.toExponential(1) : value);
const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : /(s|x)$/.test(noun) ? "es" : "s"}`;
