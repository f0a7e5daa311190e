// The function as a graph on a canvas: boxes of groups that open and close, laid out by dagre one group at a time.

const graphPane = { open: new Map(), boxes: [], edges: [], view: { x: 0, y: 0, zoom: 1 }, colour: "kind", moved: false, colours: {} };
const HEAD = 24, PAD = 12, LEAF = 36;
const KINDS = [
  [/linear|matmul|addmm|bmm|\bmm\b|conv|einsum|_mlp|grouped_mm/, "matmul", "products and convolutions"],
  [/attention|rat_/, "attention", "attention"],
  [/norm|softmax|mean|sum|var|max\b|min\b|cumsum/, "norm", "norms and sums"],
  [/view|reshape|transpose|permute|expand|squeeze|slice|select|unflatten|flatten|getitem|alias|split|chunk|t\.default|unbind/, "view", "views"],
  [/^gw\./, "gw", "regions, other operators of the dialect"],
  [/^aten\./, "point", "other operators of ATen: most work element by element"],
];

const kindOf = (op) => (KINDS.find(([pattern]) => pattern.test(op || "")) || [null, "other"])[1];

function startGraph() {
  const canvas = byId("canvas");
  graphPane.context = canvas.getContext("2d");
  const chooser = byId("colour");
  const ways = ["kind", "change", "bytes"];
  if (report.data.kernels.some((each) => each.seconds !== null)) ways.push("time");
  if (report.data.errors.length) ways.push("error");
  chooser.append(...ways.map((way) => make("option", { value: way }, way)));
  releaseAfterPointer(chooser);
  chooser.addEventListener("change", () => { graphPane.colour = chooser.value; heat(); drawGraph(); });
  byId("fold").addEventListener("click", foldAll);
  byId("unfold").addEventListener("click", openSelected);
  byId("fit").addEventListener("click", () => fitGraph(true));
  new ResizeObserver(resizeGraph).observe(byId("stagebox"));
  canvas.addEventListener("wheel", wheelGraph, { passive: false });
  canvas.addEventListener("pointerdown", dragGraph);
  canvas.addEventListener("pointermove", hoverGraph);
  canvas.addEventListener("pointerleave", () => { byId("tip").style.display = "none"; });
  canvas.addEventListener("keydown", graphKey);
  onChange((names) => {
    if (names.has("stage") || names.has("fn")) fillGraph();
    else if (names.has("selected")) { keepInSight(); drawGraph(); }
    else drawGraph();
  });
  readColours();
  fillGraph();
}

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["page", "raised", "line", "ink", "quiet", "faint", "accent", "accent-soft", "select", "match", "add", "add-ink", "move", "move-ink", "remove-ink", "curve", "curve-soft", "before", "before-soft", ...KINDS.map(([, kind]) => `k-${kind}`), "k-other"];
  graphPane.colours = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  graphPane.sans = style.getPropertyValue("--sans");
}

function fillGraph() {
  const key = `${nowProgram()}/${state.fn}`;
  if (graphPane.key === key) { drawGraph(); return; }
  graphPane.key = key;
  graphPane.groups = groupsOf(nowProgram(), state.fn);
  if (!graphPane.open.has(key)) graphPane.open.set(key, firstOpen(graphPane.groups.root));
  layoutGraph();
  heat();
  fitGraph(false);
  keepInSight();
}

const isOpen = (node) => node.children && graphPane.open.get(graphPane.key).has(node.path);

// --- layout ---

function layoutGraph() {
  const edges = siblingEdges();
  graphPane.boxes = [];
  graphPane.edges = [];
  const root = graphPane.groups.root;
  const laid = laidOut(root, edges);
  place(laid, 0, 0);
  graphPane.size = { width: laid.width, height: laid.height };
  const boxOf = new Map(graphPane.boxes.map((box) => [box.node, box]));
  for (const [from, to] of edges.drawn.values()) {
    const a = boxOf.get(from), b = boxOf.get(to);
    if (a && b) graphPane.edges.push({ a, b, points: edges.routes.get(`${from.path}|${to.path}`) });
  }
  byId("canvas").setAttribute("aria-label", `Graph of the function in ${counted(graphPane.boxes.length - 1, "box")}: each is a line of the text beside it, or a group of lines`);
}

// For every read: the two boxes in sight that it joins, and the two that are siblings in the innermost open group that holds both.
function siblingEdges() {
  const { chains } = graphPane.groups, within = new Map(), drawn = new Map(), lines = nowLines();
  for (const [placeOf, chain] of chains) {
    for (const read of lines[placeOf].reads || []) {
      const other = chains.get(read);
      if (!other) continue;
      let level = 0;
      while (level + 1 < chain.length && level + 1 < other.length && chain[level + 1] === other[level + 1] && isOpen(chain[level + 1])) level++;
      const a = other[level + 1], b = chain[level + 1];
      if (!a || !b || a === b) continue;
      const parent = chain[level].path;
      if (!within.has(parent)) within.set(parent, new Map());
      within.get(parent).set(`${a.path}|${b.path}`, [a, b]);
      const [from, to] = [deepest(other), deepest(chain)];
      drawn.set(`${from.path}|${to.path}`, [from, to]);
    }
  }
  return { within, drawn, routes: new Map() };
}

function deepest(chain) {
  let at = 0;
  while (at + 1 < chain.length && isOpen(chain[at])) at++;
  return chain[at];
}

function widthOf(node) {
  graphPane.context.font = `600 11.5px ${graphPane.sans}`;
  const [head, detail] = wordsOf(node);
  const wide = graphPane.context.measureText(head).width;
  graphPane.context.font = `10.5px ${graphPane.sans}`;
  return Math.min(Math.max(wide, graphPane.context.measureText(detail).width) + 26, 260);
}

// What a box says: a name, and below it the type or what it holds.
function wordsOf(node) {
  if (node.kind === "op") {
    const line = nowLines()[node.line];
    return [node.module ? `${node.module} · ${node.name}` : node.name, visible(typeOf(line))];
  }
  if (node.kind === "region") return [`sliced × ${(/count=(\S+)/.exec(nowLines()[node.line].text) || ["", "?"])[1]}`, counted(node.lines.length - 1, "line")];
  return [`${visible(node.name) || "main"}${node.kind === "repeat" ? `  × ${node.count}` : ""}`, counted(node.lines.length, "line")];
}

function laidOut(node, edges) {
  if (!isOpen(node)) return { node, width: widthOf(node), height: LEAF, inside: [] };
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", nodesep: 14, ranksep: 20, edgesep: 8 });
  graph.setDefaultEdgeLabel(() => ({}));
  const inside = node.children.map((child) => laidOut(child, edges));
  inside.forEach((each) => graph.setNode(each.node.path, { width: each.width, height: each.height }));
  const own = edges.within.get(node.path) || new Map();
  for (const [a, b] of own.values()) graph.setEdge(a.path, b.path);
  dagre.layout(graph);
  const top = node.path ? HEAD : PAD;
  for (const each of inside) {
    const at = graph.node(each.node.path);
    each.x = at.x - each.width / 2 + PAD;
    each.y = at.y - each.height / 2 + top;
  }
  const routes = [...own.values()].map(([a, b]) => [`${a.path}|${b.path}`, graph.edge(a.path, b.path).points.map((p) => ({ x: p.x + PAD, y: p.y + top }))]);
  const { width, height } = graph.graph();
  return { node, inside, routes, edges, width: Math.max(width + 2 * PAD, node.path ? widthOf(node) : 0), height: height + top + PAD, open: true };
}

function place(laid, x, y) {
  graphPane.boxes.push({ node: laid.node, x, y, width: laid.width, height: laid.height, open: laid.open });
  for (const [key, points] of laid.routes || []) laid.edges.routes.set(key, points.map((p) => ({ x: p.x + x, y: p.y + y })));
  for (const each of laid.inside) place(each, x + each.x, y + each.y);
}

// --- opening and closing ---

function toggle(node) {
  const open = graphPane.open.get(graphPane.key), before = graphPane.boxes.find((box) => box.node === node);
  if (open.has(node.path)) open.delete(node.path); else open.add(node.path);
  layoutGraph();
  const after = graphPane.boxes.find((box) => box.node === node), { view } = graphPane;
  if (before && after) { // the box that was clicked stays under the pointer
    view.x += (before.x - after.x) * view.zoom;
    view.y += (before.y - after.y) * view.zoom;
  }
  drawGraph();
}

function foldAll() {
  graphPane.open.set(graphPane.key, new Set([graphPane.groups.root.path]));
  layoutGraph();
  fitGraph(false);
}

function openSelected() {
  const chain = graphPane.groups.chains.get(state.selected);
  if (!chain) return;
  for (const node of chain) if (node.children) graphPane.open.get(graphPane.key).add(node.path);
  layoutGraph();
  keepInSight();
  drawGraph();
}

// --- view ---

function resizeGraph() {
  const canvas = byId("canvas"), { width, height } = byId("stagebox").getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1, wasEmpty = !canvas.width;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  graphPane.extent = { width, height, ratio };
  if (wasEmpty || !graphPane.moved) fitGraph(false);
  drawGraph();
}

// All of it; without `whole` never so small that nothing can be read.
function fitGraph(whole) {
  const { extent, size, view } = graphPane;
  if (!extent || !size || !extent.width) return;
  const zoom = Math.min((extent.width - 16) / size.width, (extent.height - 16) / size.height, 1.2);
  view.zoom = whole ? zoom : Math.max(zoom, Math.min(0.75, (extent.width - 16) / size.width), 0.3);
  view.x = (extent.width - size.width * view.zoom) / 2;
  if (view.x < 8) { // what does not fit begins with its topmost box
    const top = graphPane.boxes.slice(1).reduce((highest, box) => (box.y < highest.y ? box : highest), { x: 0, y: Infinity, width: size.width });
    view.x = extent.width / 2 - (top.x + top.width / 2) * view.zoom;
  }
  view.y = Math.max((extent.height - size.height * view.zoom) / 2, 8);
  graphPane.moved = false;
  drawGraph();
}

function boxOfLine(line) {
  const chain = graphPane.groups.chains.get(line);
  if (!chain) return null;
  const node = deepest(chain);
  return graphPane.boxes.find((box) => box.node === node) || null;
}

function keepInSight() {
  const box = boxOfLine(state.selected), { view, extent } = graphPane;
  if (!box || !extent) return;
  const x = view.x + (box.x + box.width / 2) * view.zoom, y = view.y + (box.y + Math.min(box.height, 60) / 2) * view.zoom;
  if (x > 30 && x < extent.width - 30 && y > 20 && y < extent.height - 20) return;
  view.x += extent.width / 2 - x;
  view.y += extent.height / 2.6 - y;
  drawGraph();
}

function zoomAt(x, y, factor) {
  const { view } = graphPane, zoom = Math.min(Math.max(view.zoom * factor, 0.02), 4);
  view.x = x - (x - view.x) * (zoom / view.zoom);
  view.y = y - (y - view.y) * (zoom / view.zoom);
  view.zoom = zoom;
  graphPane.moved = true;
  drawGraph();
}

function wheelGraph(event) {
  event.preventDefault();
  if (event.ctrlKey || event.metaKey || !event.shiftKey) zoomAt(event.offsetX, event.offsetY, Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)));
  else { graphPane.view.x -= event.deltaY; drawGraph(); }
}

function dragGraph(event) {
  const canvas = byId("canvas"), { view } = graphPane, start = { x: event.clientX, y: event.clientY, vx: view.x, vy: view.y };
  const { offsetX, offsetY } = event;
  canvas.setPointerCapture(event.pointerId);
  let far = false;
  const move = (e) => {
    if (!far && Math.hypot(e.clientX - start.x, e.clientY - start.y) < 4) return;
    far = graphPane.moved = true;
    view.x = start.vx + e.clientX - start.x;
    view.y = start.vy + e.clientY - start.y;
    drawGraph();
  };
  const up = () => {
    canvas.removeEventListener("pointermove", move);
    canvas.removeEventListener("pointerup", up);
    if (!far) clickGraph(offsetX, offsetY);
  };
  canvas.addEventListener("pointermove", move);
  canvas.addEventListener("pointerup", up);
}

function boxAt(x, y) {
  const { view, boxes } = graphPane, px = (x - view.x) / view.zoom, py = (y - view.y) / view.zoom;
  for (let n = boxes.length - 1; n > 0; n--) {
    const box = boxes[n];
    if (px >= box.x && px <= box.x + box.width && py >= box.y && py <= box.y + box.height) return { box, inHead: py <= box.y + HEAD };
  }
  return null;
}

function clickGraph(x, y) {
  const hit = boxAt(x, y);
  if (!hit) return;
  const { node } = hit.box;
  if (node.children && (!hit.box.open || hit.inHead)) toggle(node);
  if (node.line >= 0) selectLine(node.line);
}

function hoverGraph(event) {
  const hit = boxAt(event.offsetX, event.offsetY), tip = byId("tip"), canvas = byId("canvas");
  canvas.style.cursor = hit && (hit.box.node.line >= 0 || hit.box.node.children) ? "pointer" : "grab";
  if (!hit || (hit.box.open && !hit.inHead)) { tip.style.display = "none"; return; }
  tip.textContent = describe(hit.box.node);
  tip.style.display = "block";
  tip.style.left = `${Math.min(event.offsetX + 14, graphPane.extent.width - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(event.offsetY + 16, graphPane.extent.height - 28)}px`;
}

function describe(node) {
  const lines = nowLines();
  if (node.kind === "op") {
    const where = whereOf(lines[node.line]);
    return visible([`${nameOf(lines[node.line])} = ${lines[node.line].op || lines[node.line].kind}`, typeOf(lines[node.line]), where ? `${where.file}:${where.line} ${where.module}` : ""].filter(Boolean).join("   "));
  }
  const heatText = graphPane.colour === "kind" ? "" : `   ${graphPane.colour} ${heatWords(graphPane.heats.get(node) || 0)}`;
  return visible(`${node.path.replace(/^\//, "").replaceAll("/", ".") || "main"}   ${counted(node.lines.length, "line")}${heatText}   ${isOpen(node) ? "click to fold" : "click to open"}`);
}

function graphKey(event) {
  const { view, extent } = graphPane;
  const shift = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[event.key];
  if (shift) { view.x += shift[0]; view.y += shift[1]; drawGraph(); }
  else if (event.key === "+" || event.key === "=") zoomAt(extent.width / 2, extent.height / 2, 1.25);
  else if (event.key === "-") zoomAt(extent.width / 2, extent.height / 2, 0.8);
  else if (event.key === "Enter") {
    const box = boxOfLine(state.selected);
    if (box && box.node.children) toggle(box.node);
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

// --- colours of boxes ---

function heat() {
  graphPane.heats = new Map();
  if (graphPane.colour === "kind") return;
  const measure = { change: changedLines(), bytes: (place) => nowLines()[place].bytes || 0, time: (place) => (isLast(nowProgram()) && report.kernels.get(place)?.seconds) || 0, error: (place) => (isLast(nowProgram()) && asNumber(report.errors.get(place)?.after)) || 0 }[graphPane.colour];
  const merge = graphPane.colour === "time" || graphPane.colour === "change" ? (a, b) => a + b : Math.max;
  const visit = (node) => {
    let value = node.kind === "op" || node.kind === "region" ? measure(node.line) : 0;
    for (const child of node.children || []) value = merge(value, visit(child));
    if (graphPane.colour === "change" && node.kind === "op") value = Math.min(value, 1);
    graphPane.heats.set(node, value);
    return value;
  };
  const whole = visit(graphPane.groups.root);
  graphPane.hottest = graphPane.colour === "change" ? 1 : graphPane.colour === "time" ? Math.max(...graphPane.boxes.slice(1).map((box) => (box.open ? 0 : graphPane.heats.get(box.node) || 0)), 1e-12) : whole || 1;
}

const heatWords = (value) => ({ bytes: bytes, time: seconds, error: scientific, change: (count) => counted(count, "changed line") }[graphPane.colour](value));

function changedLines() {
  if (state.stage === 0 || nowProgram() === 0) return () => 0;
  const difference = differenceOf(nowProgram() - 1, nowProgram()), changed = new Set();
  for (const [marker, , after, count] of difference.rows) if (marker !== " " && after >= 0) for (let k = 0; k < count; k++) changed.add(after + k);
  return (place) => Number(changed.has(place));
}

// --- drawing ---

function drawGraph() {
  if (graphPane.waiting) return;
  graphPane.waiting = true;
  requestAnimationFrame(() => { graphPane.waiting = false; paintGraph(); });
}

function paintGraph() {
  const { context: c, view, extent, boxes, edges, colours } = graphPane;
  if (!extent) return;
  c.setTransform(extent.ratio, 0, 0, extent.ratio, 0, 0);
  c.fillStyle = colours.page;
  c.fillRect(0, 0, extent.width, extent.height);
  c.translate(view.x, view.y);
  c.scale(view.zoom, view.zoom);
  const sight = { left: -view.x / view.zoom, top: -view.y / view.zoom, right: (extent.width - view.x) / view.zoom, bottom: (extent.height - view.y) / view.zoom };
  const isSeen = (box) => box.x < sight.right && box.x + box.width > sight.left && box.y < sight.bottom && box.y + box.height > sight.top;
  const now = boxOfLine(state.selected);
  const lit = new Set([...state.lit].map((line) => boxOfLine(line)));
  const matches = new Set(state.query ? state.matches.slice(0, 2000).map((line) => boxOfLine(line)) : []);
  for (const box of boxes.slice(1)) if (box.open && isSeen(box)) paintGroup(c, box, box === now);
  c.lineWidth = 1.1 / Math.max(view.zoom, 0.5);
  for (const edge of edges) paintEdge(c, edge, sight, now);
  for (const box of boxes.slice(1)) if (!box.open && isSeen(box)) paintBox(c, box, { now: box === now, lit: lit.has(box), match: matches.has(box) });
}

function rounded(c, x, y, width, height, radius) {
  c.beginPath();
  c.roundRect(x, y, width, height, radius);
}

function paintGroup(c, box, now) {
  const { colours } = graphPane;
  rounded(c, box.x, box.y, box.width, box.height, 7);
  c.fillStyle = colours.raised;
  c.globalAlpha = 0.75;
  c.fill();
  c.globalAlpha = 1;
  c.strokeStyle = now ? colours.accent : colours.line;
  c.lineWidth = now ? 2 : 1;
  c.stroke();
  c.fillStyle = box.node.kind === "region" ? colours["k-gw"] : colours.quiet;
  c.font = `600 11px ${graphPane.sans}`;
  c.fillText(clipped(c, `▾ ${wordsOf(box.node)[0]}`, box.width - 16), box.x + 9, box.y + 16);
}

function paintEdge(c, { a, b, points }, sight, now) {
  const { colours } = graphPane, isNear = now && (a === now || b === now);
  const from = { x: a.x + a.width / 2, y: a.y + a.height }, to = { x: b.x + b.width / 2, y: b.y };
  if (Math.max(from.y, to.y) < sight.top || Math.min(from.y, to.y) > sight.bottom) return;
  c.strokeStyle = isNear ? colours.accent : colours.before;
  c.globalAlpha = isNear ? 1 : 0.75;
  c.beginPath();
  if (points && points.length > 1) {
    c.moveTo(points[0].x, points[0].y);
    for (let n = 1; n < points.length - 1; n++) {
      const next = points[n + 1];
      c.quadraticCurveTo(points[n].x, points[n].y, n === points.length - 2 ? next.x : (points[n].x + next.x) / 2, n === points.length - 2 ? next.y : (points[n].y + next.y) / 2);
    }
    if (points.length === 2) c.lineTo(points[1].x, points[1].y);
  } else {
    const bend = Math.max(Math.abs(to.y - from.y) / 2, 16);
    c.moveTo(from.x, from.y);
    c.bezierCurveTo(from.x, from.y + bend, to.x, to.y - bend, to.x, to.y);
  }
  c.stroke();
  c.globalAlpha = 1;
  const tip = points && points.length > 1 ? points[points.length - 1] : to;
  c.fillStyle = c.strokeStyle;
  c.beginPath();
  c.moveTo(tip.x, tip.y);
  c.lineTo(tip.x - 3, tip.y - 5);
  c.lineTo(tip.x + 3, tip.y - 5);
  c.fill();
}

function paintBox(c, box, { now, lit, match }) {
  const { colours, colour, view } = graphPane, { node } = box;
  rounded(c, box.x, box.y, box.width, box.height, 5);
  c.fillStyle = now ? colours.select : match ? colours.match : colours.page;
  c.fill();
  if (colour !== "kind") {
    const value = Math.min((graphPane.heats.get(node) || 0) / (graphPane.hottest || 1), 1);
    c.globalAlpha = value ? 0.1 + 0.4 * value : 0;
    c.fillStyle = colour === "change" ? colours["add-ink"] : colour === "error" ? colours["remove-ink"] : colours.curve;
    c.fill();
    c.globalAlpha = 1;
  }
  c.strokeStyle = now || lit ? colours.accent : colours.line;
  c.lineWidth = now ? 2 : lit ? 1.8 : 1;
  c.stroke();
  const kind = node.kind === "op" ? kindOf(nowLines()[node.line].op) : node.kind === "region" ? "gw" : "other";
  c.fillStyle = colours[`k-${kind}`];
  if (node.kind === "op") c.fillRect(box.x + 1, box.y + 6, 3, box.height - 12);
  if (view.zoom < 0.22) return;
  const [head, detail] = wordsOf(node);
  c.fillStyle = colours.ink;
  c.font = `600 11.5px ${graphPane.sans}`;
  c.fillText(clipped(c, `${node.children ? "▸ " : ""}${head}`, box.width - 16), box.x + 10, box.y + 15);
  c.fillStyle = colour === "kind" ? colours.quiet : colours.ink;
  c.font = `10.5px ${graphPane.sans}`;
  c.fillText(clipped(c, detail, box.width - 16), box.x + 10, box.y + 28);
}

function clipped(c, text, width) {
  if (c.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 1 && c.measureText(`${text.slice(0, end)}…`).width > width) end = Math.floor(end * 0.9);
  return `${text.slice(0, end)}…`;
}
