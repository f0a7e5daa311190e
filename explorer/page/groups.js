// A function as nested groups: the user's modules, regions, runs of equal layers, and stretches of what would be too many boxes at once.

const MANY = 64;
const FIRST_BOXES = 36;

const shortOp = (op) => (op || "").replace(/^(aten|prims)\./, "").replace(/\.(default|Tensor|Scalar|int|dim)$/, "");
const label = (line) => (line.op ? shortOp(line.op) : line.kind === "input" ? `input ${nameOf(line)}` : line.kind);

function groupsOf(program, fn) {
  const { first, last } = report.data.programs[program].functions[fn], lines = linesOf(program);
  const root = { kind: "module", name: "", path: "", children: [], kids: new Map(), line: -1 };
  const regions = new Map(), inputs = new Map(); // inputs of a region have no box: the region reads its operands
  for (let place = first; place <= last; place++) {
    const line = lines[place];
    if (!["input", "call", "return"].includes(line.kind)) continue;
    if (line.region !== undefined && line.kind === "input") { inputs.set(place, line.region); continue; }
    const inside = line.region === undefined ? root : regions.get(line.region);
    const where = whereOf(line);
    const parent = descend(inside, where ? where.module : "");
    if (line.op === "gw.sliced") {
      const region = { kind: "region", name: "gw.sliced", path: `region ${place}`, children: [], kids: new Map(), line: place };
      regions.set(place, region);
      parent.children.push(region);
    } else parent.children.push({ kind: "op", name: label(line), line: place, path: `line ${place}` });
  }
  const groups = named(simplified(root, lines, new Map()));
  for (const [place, region] of inputs) groups.chains.set(place, groups.chains.get(region));
  return groups;
}

function descend(group, module) {
  if (!module) return group;
  for (const part of module.split(".")) {
    if (!group.kids.has(part)) {
      const kid = { kind: "module", name: part, path: `${group.path}/${part}`, children: [], kids: new Map(), line: -1 };
      group.kids.set(part, kid);
      group.children.push(kid);
    }
    group = group.kids.get(part);
  }
  return group;
}

// A module of one thing is that thing; equal neighbours are one group; a signature tells which are equal.
function simplified(group, lines, interned) {
  if (group.kind === "op") return { ...group, signature: intern(interned, lines[group.line].op || lines[group.line].kind), lines: [group.line] };
  let children = group.children.map((child) => simplified(child, lines, interned));
  if (group.kind === "module" && children.length === 1 && group.path) {
    const [only] = children;
    if (only.kind === "op") return { ...only, name: only.name, module: group.name };
    return { ...only, name: only.kind === "module" ? `${group.name}.${only.name}` : only.name };
  }
  const signature = intern(interned, `${group.kind}(${children.map((child) => child.signature)})`);
  children = stretches(repeats(children));
  const inside = children.flatMap((child) => child.lines);
  return { kind: group.kind, name: group.name, path: group.path, line: group.line, children, signature, lines: group.line >= 0 ? [group.line, ...inside] : inside };
}

function intern(known, text) {
  if (!known.has(text)) known.set(text, known.size);
  return known.get(text);
}

function repeats(children) {
  const result = [];
  for (let at = 0; at < children.length;) {
    let end = at + 1;
    while (end < children.length && children[at].kind === "module" && children[end].kind === "module" && children[end].signature === children[at].signature) end++;
    if (end - at < 3) { result.push(children[at++]); continue; }
    const run = children.slice(at, end);
    result.push({ kind: "repeat", name: `${run[0].name} … ${run[run.length - 1].name}`, count: run.length, path: `${run[0].path} and ${run.length - 1} more`, line: -1, children: stretches(run), signature: -1, lines: run.flatMap((each) => each.lines) });
    at = end;
  }
  return result;
}

function stretches(children) {
  if (children.length <= MANY) return children;
  const size = Math.max(Math.ceil(Math.sqrt(children.length)), Math.ceil(children.length / MANY)), result = [];
  for (let at = 0; at < children.length; at += size) {
    const part = children.slice(at, at + size);
    result.push({ kind: "stretch", name: `${part[0].name} … ${part[part.length - 1].name}`, count: part.length, path: `${part[0].path} and on`, line: -1, children: stretches(part), signature: -1, lines: part.flatMap((each) => each.lines) });
  }
  return result;
}

// The chain of a line: the groups from the outermost in that hold it, and its own box.
function named(root) {
  const chains = new Map();
  const visit = (node, above) => {
    const chain = [...above, node];
    if (node.line >= 0) chains.set(node.line, chain);
    for (const child of node.children || []) visit(child, chain);
  };
  visit(root, []);
  return { root, chains };
}

// Groups to open at first: in order, as long as there are not too many boxes.
function firstOpen(root) {
  const open = new Set([root.path]);
  let boxes = root.children.length;
  const waiting = root.children.filter((child) => child.children);
  while (waiting.length) {
    const group = waiting.shift();
    if (group.kind === "repeat" || group.kind === "stretch" || boxes + group.children.length > FIRST_BOXES) continue;
    open.add(group.path);
    boxes += group.children.length - 1;
    waiting.push(...group.children.filter((child) => child.children));
  }
  return open;
}
