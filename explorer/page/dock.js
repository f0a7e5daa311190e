// The lower part: the stage in words, memory, rewrites, what was left alone, kernels, errors of layers, schedules.

const dock = { tables: [] };

function startDock() {
  const { data } = report;
  const panels = [
    ["stage", "Stage", stagePanel, ""],
    ["memory", "Memory", memoryPanel, ""],
    ["rewrites", "Rewrites", rewritesPanel, data.stages.reduce((sum, each) => sum + each.records.length, 0)],
    ["left", "Left alone", leftPanel, data.stages.reduce((sum, each) => sum + each.left.length, 0)],
    ["kernels", "Kernels", kernelsPanel, data.kernels.length],
    ["error", "Error by layer", errorPanel, data.errors.length],
    ["schedules", "Schedules", schedulesPanel, data.schedules.length],
  ];
  const tabs = byId("tabs");
  for (const [name, title, build, count] of panels) {
    const tab = make("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `panel-${name}`, onclick: () => change({ dock: name }) }, title);
    if (count) tab.append(make("span", { className: "count" }, count.toLocaleString("en")));
    tabs.append(tab);
    const panel = build();
    panel.id = `panel-${name}`;
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", `tab-${name}`);
    byId("panels").append(panel);
  }
  tabs.addEventListener("keydown", tabKeys);
  const show = () => {
    for (const [name] of panels) {
      byId(`panel-${name}`).hidden = name !== state.dock;
      setTab(byId(`tab-${name}`), name === state.dock);
    }
    for (const table of dock.tables) table.refresh();
  };
  onChange((names) => {
    if (names.has("dock")) show();
    else if (names.has("selected") || names.has("stage")) for (const table of dock.tables) table.refresh();
  });
  show();
  fillMemory();
}

const panelOf = (...content) => make("div", { className: "panel" }, ...content);

function kept(table) {
  dock.tables.push(table);
  return table.element;
}

function stagePanel() {
  const box = make("div", { className: "pane" });
  const fill = () => {
    const stage = report.data.stages[state.stage], { data } = report, facts = make("dl", { className: "facts" });
    box.replaceChildren(facts);
    fact(facts, "stage", `${state.stage + 1} of ${data.stages.length}: ${stage.pipeline || stage.name}`);
    if (stage.contract) fact(facts, "contract", `${stage.contract.name}. ${stage.contract.promise}`);
    if (stage.seconds !== undefined) fact(facts, "took", seconds(stage.seconds) + (stage.kept ? ", in an earlier run" : ""));
    if (stage.verdict) fact(facts, "checked", verdictText(stage.verdict));
    if (stage.lines.length) fact(facts, "says", stage.lines.map((line) => make("div", {}, line)));
    const difference = state.stage && programOf(state.stage) !== programOf(state.stage - 1) ? differenceOf(programOf(state.stage - 1), programOf(state.stage)) : null;
    fact(facts, "changed", difference ? difference.said : state.stage ? "nothing" : "");
    box.append(make("h2", {}, "The whole"));
    const whole = make("dl", { className: "facts" });
    box.append(whole);
    fact(whole, "pipeline", data.pipeline || "no passes");
    fact(whole, "contract", `${data.contract.name}. ${data.contract.promise}`);
    const peaks = [data.programs[0], data.programs[data.programs.length - 1]].map((program) => program.functions.find((each) => each.name === "main").memory.peak_bytes);
    fact(whole, "peak memory", `${bytes(peaks[0])} as captured, ${bytes(peaks[1])} in the end, as predicted${data.measured.peak_bytes === null ? "" : `; ${bytes(data.measured.peak_bytes)} measured`}`);
    if (data.measured.seconds !== null) fact(whole, "time of a call", seconds(data.measured.seconds));
    if (data.backend) fact(whole, "backend", `${data.backend}, torch ${data.torch}`);
  };
  onChange((names) => { if (names.has("stage")) fill(); });
  fill();
  return panelOf(box);
}

function verdictText(verdict) {
  const parts = [verdict.kind, verdict.reason, verdict.worst].filter(Boolean).join(": ");
  return `${parts}; error in float64 ${scientific(verdict.rewrite_error)}, in the working dtype ${scientific(verdict.error)} (${asNumber(verdict.error_ratio).toFixed(2)} × the original's own)`;
}

function rewritesPanel() {
  const rows = report.data.stages.flatMap((stage, number) => stage.records.map((record) => ({ stage, number, record })));
  const names = (list) => list.map((each) => each.label.split(" ")[0]).join(", ");
  return panelOf(kept(new Table(
    [
      { title: "pass", width: 150, text: (row) => row.stage.name },
      { title: "rule", width: "2fr", text: (row) => row.record.rule },
      { title: "took", width: "3fr", mono: true, text: (row) => names(row.record.before) },
      { title: "gave", width: "3fr", mono: true, text: (row) => names(row.record.after) },
      { title: "µs", width: 70, number: true, value: (row) => row.record.microseconds, text: (row) => row.record.microseconds.toFixed(0) },
      { title: "rule stands at", width: "2fr", text: (row) => `${row.record.file}:${row.record.line}` },
    ],
    rows,
    { label: "Rewrites in order", choose: chooseRewrite, isNow: (row) => row.number === state.stage && row.record.after.some((each) => each.line === state.selected && each.line >= 0), empty: "No pass changed the program." },
  )));
}

function chooseRewrite({ number, record }) {
  const after = record.after.map((each) => each.line).filter((line) => line >= 0), before = record.before.map((each) => each.line).filter((line) => line >= 0);
  if (after.length) {
    if (state.stage !== number) selectStage(number);
    selectLine(after[0], nowProgram(), new Set(after));
  } else {
    if (state.stage !== number - 1) selectStage(number - 1);
    if (before.length) selectLine(before[0], nowProgram(), new Set(before));
  }
}

function leftPanel() {
  const rows = report.data.stages.flatMap((stage, number) => stage.left.map((left) => ({ stage, number, left })));
  return panelOf(kept(new Table(
    [
      { title: "pass", width: 150, text: (row) => row.stage.name },
      { title: "what", width: "2fr", mono: true, text: (row) => row.left.what },
      { title: "why it was left alone", width: "5fr", text: (row) => row.left.reason },
      { title: "from", width: "3fr", text: (row) => row.left.where },
    ],
    rows,
    {
      label: "What passes left alone, and why",
      choose: (row) => { if (row.left.line >= 0) selectLine(row.left.line, programOf(row.number - 1)); },
      isNow: (row) => row.left.line >= 0 && row.left.line === state.selected && programOf(row.number - 1) === nowProgram(),
      empty: "No pass looked at something and left it alone. What a pass never looked at is not listed; `graphwright passes PASS` says what it looks for.",
    },
  )));
}

function kernelsPanel() {
  const { kernels } = report.data, lines = linesOf(report.data.programs.length - 1), source = make("pre", { className: "source-of mono", tabIndex: 0, hidden: true });
  const timed = kernels.some((each) => each.seconds !== null), total = kernels.reduce((sum, each) => sum + asNumber(each.seconds), 0), top = Math.max(...kernels.map((each) => asNumber(each.seconds)), 0);
  const columns = [
    { title: "#", width: 50, number: true, value: (row) => row.at, text: (row) => String(row.at + 1) },
    { title: "kernel", width: "3fr", mono: true, text: (row) => row.kernel.name },
    { title: "kind", width: 80, text: (row) => row.kernel.kind },
    { title: "bytes", width: 92, number: true, value: (row) => row.kernel.bytes, text: (row) => bytes(row.kernel.bytes) },
    { title: "from", width: "3fr", text: (row) => (row.kernel.lines.length ? whereText(lines[row.kernel.lines[0]]) : "") },
  ];
  if (timed) {
    columns.splice(3, 0,
      { title: "time", width: 92, number: true, value: (row) => asNumber(row.kernel.seconds), text: (row) => seconds(row.kernel.seconds), bar: (row) => asNumber(row.kernel.seconds) / (top || 1) },
      { title: "share", width: 60, number: true, value: (row) => asNumber(row.kernel.seconds), text: (row) => `${((100 * asNumber(row.kernel.seconds)) / (total || 1)).toFixed(1)} %` });
    columns.splice(6, 0, { title: "GB/s", width: 64, number: true, value: rate, text: (row) => rate(row).toFixed(1) });
  }
  const choose = ({ kernel }) => {
    source.hidden = !kernel.source;
    const texts = [kernel.source, kernel.emitted ? `The C++ that Inductor made of it\n\n${kernel.emitted}` : ""].filter(Boolean);
    source.textContent = texts.join("\n\n").split("\n").map(visible).join("\n");
    if (kernel.lines.length) selectLine(kernel.lines[0], report.data.programs.length - 1, new Set(kernel.lines));
  };
  const table = new Table(columns, kernels.map((kernel, at) => ({ kernel, at })), {
    label: "Kernels of a call", choose, isNow: (row) => isLast(nowProgram()) && row.kernel.lines.includes(state.selected),
    sort: timed ? 3 : undefined,
    empty: "Nobody looked at the kernels of a call: compiled.profile(*inputs) before the report, or graphwright view --profile, takes the time of each.",
  });
  return panelOf(kept(table), source);
}

const rate = (row) => (row.kernel.seconds ? row.kernel.bytes / asNumber(row.kernel.seconds) / 1e9 : 0);

function errorPanel() {
  const { errors } = report.data, log = (value) => (value ? Math.max((Math.log10(asNumber(value)) + 8) / 8, 0.01) : 0);
  return panelOf(kept(new Table(
    [
      { title: "#", width: 50, number: true, value: (row) => row.at, text: (row) => String(row.at + 1) },
      { title: "layer", width: 320, text: (row) => row.error.module || "(the model itself)" },
      { title: "captured", width: 120, number: true, value: (row) => asNumber(row.error.before), text: (row) => scientific(row.error.before), bar: (row) => log(row.error.before) },
      { title: "compiled", width: 120, number: true, value: (row) => asNumber(row.error.after), text: (row) => (row.error.after === null ? "no such value" : scientific(row.error.after)), bar: (row) => log(row.error.after) },
      { title: "ratio", width: 80, number: true, value: ratio, text: (row) => (row.error.after === null ? "" : ratio(row) < 100 ? ratio(row).toFixed(2) : Math.round(ratio(row)).toLocaleString("en")) },
      { title: "", width: 24, text: () => "" },
      { title: "its result", width: "1fr", mono: true, text: ({ error }) => (error.line >= 0 ? linesOf(report.data.programs.length - 1)[error.line] : linesOf(0)[error.line_before]).text.trim() },
    ],
    errors.map((error, at) => ({ error, at })),
    {
      label: "Error of each layer against float64",
      choose: ({ error }) => (error.line >= 0 ? selectLine(error.line, report.data.programs.length - 1) : selectLine(error.line_before, 0)),
      isNow: (row) => (isLast(nowProgram()) ? row.error.line === state.selected && state.selected >= 0 : nowProgram() === 0 && row.error.line_before === state.selected),
      empty: `No errors of layers: ${report.data.errors_missing}. compiled.profile(*inputs), or graphwright view --profile, runs the model in float64 beside its own dtype.`,
    },
  )));
}

const ratio = ({ error }) => (error.after === null ? 0 : asNumber(error.before) ? asNumber(error.after) / asNumber(error.before) : asNumber(error.after) ? Infinity : 1);

function schedulesPanel() {
  const box = make("div", { className: "heat" });
  for (const schedule of report.data.schedules) {
    box.append(make("h2", {}, `${schedule.name}${schedule.title ? `: ${schedule.title}` : ""}`));
    if (schedule.values) box.append(...heatMap(schedule));
    else box.append(make("code", {}, JSON.stringify(schedule.data)));
  }
  if (!report.data.schedules.length) box.append(make("p", { className: "empty" }, "This program has no schedules: layer-skip and expert-choice with a schedule make some."));
  return panelOf(box);
}

function heatMap(schedule) {
  const { rows, columns, values } = schedule, canvas = make("canvas", { role: "img", "aria-label": `${schedule.title}, ${schedule.row_axis} by ${schedule.column_axis}` });
  const width = Math.max(Math.min(Math.floor(900 / columns.length), 34), 4), height = Math.max(Math.min(Math.floor(300 / rows.length), 16), 4);
  const most = Math.max(...values.flat().map(asNumber)) || 1, left = 34, top = 16, said = make("div", { className: "quiet" }, `${schedule.row_axis} down, ${schedule.column_axis} across`);
  const draw = () => {
    const ratioOf = window.devicePixelRatio || 1, c = canvas.getContext("2d"), { colours } = graphPane;
    const wide = left + columns.length * width, high = top + rows.length * height;
    Object.assign(canvas, { width: wide * ratioOf, height: high * ratioOf });
    canvas.style.width = `${wide}px`;
    canvas.style.height = `${high}px`;
    c.scale(ratioOf, ratioOf);
    c.font = `10.5px ${graphPane.sans}`;
    c.fillStyle = colours.quiet;
    const everyColumn = Math.ceil(40 / width), everyRow = Math.ceil(12 / height);
    columns.forEach((name, x) => { if (x % everyColumn === 0) c.fillText(visible(name), left + x * width, 11); });
    rows.forEach((name, y) => { if (y % everyRow === 0) c.fillText(visible(name), 4, top + y * height + Math.min(height, 12) - 1); });
    values.forEach((row, y) => row.forEach((value, x) => {
      c.globalAlpha = 1;
      c.fillStyle = colours.raised;
      c.fillRect(left + x * width, top + y * height, width - 1, height - 1);
      c.globalAlpha = asNumber(value) / most;
      c.fillStyle = colours.curve;
      c.fillRect(left + x * width, top + y * height, width - 1, height - 1);
    }));
    c.globalAlpha = 1;
  };
  canvas.addEventListener("mousemove", (event) => {
    const x = Math.floor((event.offsetX - left) / width), y = Math.floor((event.offsetY - top) / height);
    if (values[y] && values[y][x] !== undefined) said.textContent = visible(`${schedule.row_axis} ${rows[y]}, ${schedule.column_axis} ${columns[x]}: ${values[y][x]}`);
  });
  draw();
  document.addEventListener("themechange", draw);
  return [said, canvas];
}
