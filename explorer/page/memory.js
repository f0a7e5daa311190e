// Bytes live at each call, as captured and in the stage in sight; what is live at the call that is looked at, the peak at first.

const CALLS = [1, 2, 5, 10, 20, 50].flatMap((step) => [1, 100, 1e4, 1e6].map((unit) => step * unit)).sort((a, b) => a - b); // between marks of the axis
const memoryPane = { plot: null, at: -1, table: null };

function memoryPanel() {
  const panel = make("div", { className: "panel", id: "memory" });
  const plot = make("div", { id: "memory-plot" });
  plot.append(make("div", { id: "legend" }));
  panel.append(plot, make("div", { id: "memory-side" }));
  memoryPane.box = plot;
  new ResizeObserver(() => {
    if (memoryPane.plot) memoryPane.plot.setSize(plotSize());
    else drawMemory();
  }).observe(plot);
  onChange((names) => {
    if (names.has("stage") || names.has("fn")) { memoryPane.at = -1; fillMemory(); }
    else if (names.has("selected")) { if (memoryPane.table) memoryPane.table.refresh(); if (memoryPane.plot) memoryPane.plot.redraw(false); }
  });
  return panel;
}

const plotSize = () => ({ width: Math.max(memoryPane.box.clientWidth - 12, 80), height: Math.max(memoryPane.box.clientHeight - 10, 60) });

function capturedMemory() {
  const { name } = nowFunction();
  const fn = report.data.programs[0].functions.find((each) => each.name === name);
  return nowProgram() === 0 || !fn || !fn.memory.live.length ? null : fn.memory;
}

// Both curves over one axis, the calls of the program in sight: the captured one is stretched to its width, and keeps all its calls.
function curves(live, captured) {
  const width = live.length, stretch = captured ? width / captured.length : 1;
  const places = new Set(Array.from({ length: width + 1 }, (_, at) => at));
  if (captured) captured.forEach((_, at) => places.add(at * stretch));
  const axis = [...places].sort((a, b) => a - b);
  // A step is drawn from each call to the next, so the last is there twice.
  const over = (values, scale) => axis.map((place) => values[Math.min(Math.floor(place / scale + 1e-6), values.length - 1)]);
  return captured ? [axis, over(captured, stretch), over(live, 1)] : [axis, over(live, 1)];
}

function fillMemory() {
  drawMemory();
  fillHeld();
}

function drawMemory() {
  if (memoryPane.plot) { memoryPane.plot.destroy(); memoryPane.plot = null; }
  if (!memoryPane.box.clientWidth) return;
  const { memory } = nowFunction(), before = capturedMemory(), { colours } = graphPane;
  if (!memory.live.length) return;
  const count = memory.live.length;
  const steps = uPlot.paths.stepped({ align: 1 });
  const series = [{}, { stroke: colours.curve, fill: colours["curve-soft"], width: 1.4, paths: steps, points: { show: false } }];
  if (before) series.splice(1, 0, { stroke: colours.before, fill: colours["before-soft"], width: 1, paths: steps, points: { show: false } });
  const axis = { stroke: colours.quiet, grid: { stroke: colours.line, width: 1 }, ticks: { show: false }, font: `11px ${graphPane.sans}` };
  memoryPane.plot = new uPlot(
    {
      ...plotSize(),
      legend: { show: false },
      cursor: { y: false, drag: { x: true, y: false, dist: 6 }, points: { size: 6 } },
      scales: { x: { time: false }, y: { range: (_, low, high) => [0, (high || 1) * 1.06] } },
      axes: [{ ...axis, size: 24, incrs: CALLS }, { ...axis, size: 66, values: (_, ticks) => ticks.map(bytes), splits: (_, axisNumber, low, high) => byteSplits(high), gap: 6 }],
      series,
      hooks: { draw: [markMemory] },
    },
    curves(memory.live, before?.live),
    memoryPane.box,
  );
  const { over } = memoryPane.plot;
  let pressed = 0;
  over.addEventListener("mousedown", (event) => { pressed = event.offsetX; });
  over.addEventListener("mouseup", (event) => {
    if (Math.abs(event.offsetX - pressed) < 5) lookAt(Math.min(Math.max(Math.floor(memoryPane.plot.posToVal(event.offsetX, "x")), 0), count - 1));
  });
  const legend = byId("legend");
  legend.replaceChildren();
  const entry = (colour, text) => {
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = colour;
    return make("span", {}, swatch, text);
  };
  if (before) legend.append(entry(colours.before, `captured ${bytes(before.peak_bytes)}`));
  legend.append(entry(colours.curve, `${before ? "after " : ""}${report.data.stages[state.stage].name} ${bytes(memory.peak_bytes)}`));
}

function byteSplits(high) {
  let step = 1;
  while (high / step > 5) step *= 2;
  return Array.from({ length: Math.floor(high / step) + 1 }, (_, n) => n * step);
}

// The call that is looked at, and the life of the selected line's tensor.
function markMemory(plot) {
  const { ctx, bbox } = plot, { colours } = graphPane, { memory } = nowFunction();
  const x = (value) => plot.valToPos(value, "x", true);
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  const held = report.index[nowProgram()].storage.get(state.selected);
  if (held) {
    const left = x(held.born), width = Math.max(x(Math.min(held.dies, memory.live.length - 1) + 1) - left, 2);
    ctx.fillStyle = colours.accent;
    ctx.globalAlpha = 0.07;
    ctx.fillRect(left, bbox.top, width, bbox.height);
    ctx.globalAlpha = 0.9;
    ctx.fillRect(left, bbox.top, width, 3 * (window.devicePixelRatio || 1));
    ctx.globalAlpha = 1;
  }
  ctx.strokeStyle = colours.ink;
  ctx.setLineDash([4, 4]);
  ctx.beginPath();
  ctx.moveTo(x(looked() + 0.5), bbox.top);
  ctx.lineTo(x(looked() + 0.5), bbox.top + bbox.height);
  ctx.stroke();
  ctx.restore();
}

const looked = () => (memoryPane.at < 0 ? nowFunction().memory.peak_at : memoryPane.at);

function lookAt(position) {
  memoryPane.at = position;
  fillHeld();
  if (memoryPane.plot) memoryPane.plot.redraw(false);
  selectLine(nowFunction().memory.lines[position]);
}

function fillHeld() {
  const side = byId("memory-side"), { memory } = nowFunction(), at = looked(), lines = nowLines();
  if (!side) return;
  side.replaceChildren();
  if (!memory.live.length) { side.append(make("p", { className: "empty" }, "This function has no calls.")); return; }
  const held = memory.storages.filter((each) => each.born <= at && at <= each.dies).sort((a, b) => b.bytes - a.bytes || a.born - b.born);
  if (memory.scratch[at]) held.push({ line: memory.lines[at], bytes: memory.scratch[at], scratch: true, born: at, dies: at });
  const call = lines[memory.lines[at]], top = held.length ? Math.max(...held.map((each) => each.bytes)) : 1;
  side.append(
    make("div", { className: "said" }, make("b", {}, bytes(memory.live[at])), ` live at call ${at + 1} of ${memory.live.length}${at === memory.peak_at ? ", the peak" : ""}${sizesOf(nowProgram(), state.fn)}: `,
      make("button", { type: "button", className: "link", onclick: () => selectLine(memory.lines[at]) }, `${nameOf(call)} ${shortOp(call.op)}`), at === memory.peak_at ? null : "   ",
      at === memory.peak_at ? null : make("button", { type: "button", className: "link", onclick: () => { memoryPane.at = -1; fillHeld(); memoryPane.plot.redraw(false); } }, "to the peak")),
  );
  memoryPane.table = new Table(
    [
      { title: "tensor", width: "3fr", text: (each) => (each.scratch ? `scratch of ${shortOp(lines[each.line].op)}` : `${nameOf(lines[each.line])}  ${shortOp(lines[each.line].op)}  ${typeOf(lines[each.line])}`) },
      { title: "bytes", width: 96, number: true, value: (each) => each.bytes, text: (each) => bytes(each.bytes), bar: (each) => each.bytes / top },
      { title: "from", width: "2fr", text: (each) => whereText(lines[each.line]) },
      { title: "calls", width: 84, number: true, value: (each) => each.dies - each.born, text: (each) => `${each.born + 1}–${Math.min(each.dies + 1, memory.live.length)}` },
    ],
    held,
    { label: "Tensors live at this call", choose: (each) => selectLine(each.line), isNow: (each) => each.line === state.selected, empty: "Nothing is live here." },
  );
  side.append(memoryPane.table.element);
}

function whereText(line) {
  const where = whereOf(line);
  return where ? `${where.module || ""}${where.module && where.file ? "  " : ""}${where.file ? `${where.file.split("/").pop()}:${where.line}` : ""}` : "";
}
