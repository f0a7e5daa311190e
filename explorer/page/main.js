// The page as a whole: head, stages, search, sizes of its parts, theme, keyboard.

const KEYS = [
  ["/", "search; Enter and Shift+Enter go from one to the next, Escape ends"],
  ["n  N", "the next and the one before of what was found"],
  ["↑ ↓  j k", "line by line in the text; PageUp, PageDown, Home and End as well"],
  ["[  ]", "the stage before and the next"],
  ["d", "text, or what changed"],
  ["1 … 7", "the parts below: stage, memory, rewrites, left alone, kernels, errors, schedules"],
  ["s  l", "the user's source, or what is known of the line"],
  ["p", "the call at the peak of memory"],
  ["o  f", "open the groups of the graph around the line; fold all"],
  ["0  + −", "the whole graph; nearer, farther (with the graph in focus)"],
  ["t", "dark or light"],
  ["?", "this"],
];

function startHead() {
  const { data } = report, last = data.programs[data.programs.length - 1];
  byId("title").textContent = visible([data.title, data.pipeline.split(",").pop() && data.stages.length > 1 ? `after ${counted(data.stages.length - 1, "pass")}` : ""].filter(Boolean).join(" · "));
  const badge = byId("contract");
  badge.textContent = data.contract.name;
  badge.classList.add(data.contract.name);
  badge.title = data.contract.promise;
  const [before, after] = [data.programs[0], last].map((program) => (program.functions.find((each) => each.name === "main") || program.functions[0]).memory.peak_bytes);
  const sizes = sizesOf(data.programs.length - 1, Math.max(last.functions.findIndex((each) => each.name === "main"), 0));
  byId("peaks").textContent = visible((data.programs.length > 1 && before ? `peak ${bytes(before)} → ${bytes(after)}  (${(after / before).toFixed(2)}×)` : `peak ${bytes(after)}`) + sizes);
  byId("query").addEventListener("input", (event) => change(found(event.target.value, nowProgram())));
  byId("query").addEventListener("keydown", (event) => {
    if (event.key === "Enter") { nextMatch(event.shiftKey ? -1 : 1); event.preventDefault(); }
    if (event.key === "Escape") { event.target.value = ""; change(found("", nowProgram())); byId("text").focus(); }
    event.stopPropagation();
  });
  onChange((names) => { if (names.has("matches") || names.has("match")) sayMatches(); });
  byId("theme").addEventListener("click", switchTheme);
  byId("help").addEventListener("click", showKeys);
}

function sayMatches() {
  const { matches, match, query } = state;
  byId("matches").textContent = !query.trim() ? "" : !matches.length ? "none" : match < 0 ? counted(matches.length, "line") : `${match + 1} of ${matches.length.toLocaleString("en")}`;
}

function startStages() {
  const box = byId("stages");
  report.data.stages.forEach((stage, number) => {
    const idle = number > 0 && !stage.records.length && programOf(number) === programOf(number - 1);
    const what = number === 0 ? `${counted(linesOf(0).filter((line) => line.kind === "call").length, "call")}` : whatOf(stage, idle);
    const button = make("button", { type: "button", className: idle ? "idle" : "", title: visible(stage.pipeline || stage.name), onclick: () => selectStage(number) }, make("span", { className: "name" }, stage.name), make("span", { className: "what" }, what));
    box.append(button);
  });
  const mark = () => {
    [...box.children].forEach((button, number) => button.setAttribute("aria-current", String(number === state.stage)));
    showWithin(box, box.children[state.stage]);
  };
  onChange((names) => { if (names.has("stage")) mark(); });
  mark();
}

function showWithin(box, child) {
  const outer = box.getBoundingClientRect(), inner = child.getBoundingClientRect();
  if (inner.left < outer.left || inner.right > outer.right) box.scrollLeft += inner.left - outer.left;
  if (inner.top < outer.top || inner.bottom > outer.bottom) box.scrollTop += inner.top - outer.top;
}

// What a pass did, in a few words. Of one that ran before the program was saved its own paragraph alone tells.
function whatOf(stage, idle) {
  if (!stage.contract) return "before it was saved";
  const left = stage.left.length ? `${stage.left.length} left` : "";
  if (idle) return left ? `changed nothing · ${left}` : "nothing to do";
  return [counted(stage.records.length, "rewrite"), seconds(stage.seconds), left].filter(Boolean).join(" · ");
}

function startSplits() {
  for (const split of document.querySelectorAll(".split")) {
    const name = split.dataset.size, across = split.classList.contains("vertical"), sign = split.dataset.from === "end" ? -1 : 1;
    const target = { "--stages": "stages", "--side": "side", "--source": "below", "--dock": "dock" }[name];
    const size = () => byId(target).getBoundingClientRect()[across ? "width" : "height"];
    const set = (value) => {
      const most = (across ? window.innerWidth : window.innerHeight) - 160;
      document.documentElement.style.setProperty(name, `${Math.min(Math.max(value, Number(split.dataset.least)), most)}px`);
      split.setAttribute("aria-valuenow", String(Math.round(size())));
    };
    split.addEventListener("pointerdown", (event) => {
      const start = across ? event.clientX : event.clientY, from = size();
      split.setPointerCapture(event.pointerId);
      const move = (e) => set(from + sign * ((across ? e.clientX : e.clientY) - start));
      split.addEventListener("pointermove", move);
      split.addEventListener("pointerup", () => split.removeEventListener("pointermove", move), { once: true });
    });
    split.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -16, ArrowUp: -16, ArrowRight: 16, ArrowDown: 16 }[event.key];
      if (step) { set(size() + sign * step); event.preventDefault(); event.stopPropagation(); }
    });
  }
}

function switchTheme() {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  readColours();
  if (graphPane.groups) { drawGraph(); drawMemory(); }
  document.dispatchEvent(new Event("themechange"));
}

function showKeys() {
  const dialog = byId("keys"), legend = [["+", "added, or what is there now in its place"], ["-", "taken away, or what was there"], [">  <", "moved into a region, or out of one"], ["~", "earlier or later than before"]];
  const rows = (pairs) => make("table", {}, pairs.map(([key, text]) => make("tr", {}, make("td", {}, make("kbd", {}, key)), make("td", {}, text))));
  dialog.replaceChildren(make("h2", {}, "Keyboard"), rows(KEYS), make("h2", {}, "Marks of a difference"), rows(legend), make("h2", {}, "Colours of the graph by kind"), kindLegend(), make("p", { className: "quiet" }, "Drag over the memory curve to see a part of it, twice click to see all. Click on it to see what is live there. Escape closes this."));
  dialog.showModal();
}

function kindLegend() {
  return make("p", { className: "kinds" }, KINDS.map(([, kind, about]) => {
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = graphPane.colours[`k-${kind}`];
    return make("span", {}, swatch, about);
  }));
}

function startKeys() {
  const parts = ["stage", "memory", "rewrites", "left", "kernels", "error", "schedules"];
  const actions = {
    "/": () => { byId("query").focus(); byId("query").select(); },
    n: () => nextMatch(1), N: () => nextMatch(-1),
    "[": () => selectStage(state.stage - 1), "]": () => selectStage(state.stage + 1),
    d: () => change({ mode: state.stage && state.mode === "text" ? "previous" : "text" }),
    s: () => change({ below: "source" }), l: () => change({ below: "line" }),
    p: () => { change({ dock: "memory" }); memoryPane.at = -1; fillHeld(); selectLine(nowFunction().memory.lines[nowFunction().memory.peak_at] ?? -1); },
    o: openSelected, f: foldAll, 0: () => fitGraph(true), t: switchTheme, "?": showKeys,
  };
  document.addEventListener("keydown", (event) => {
    const tag = event.target.tagName;
    if (event.ctrlKey || event.metaKey || event.altKey || tag === "INPUT" || tag === "SELECT" || byId("keys").open) return;
    const number = Number(event.key);
    const action = number >= 1 && number <= parts.length ? () => change({ dock: parts[number - 1] }) : actions[event.key];
    if (action) { event.preventDefault(); action(); }
    else if (["j", "k", "ArrowDown", "ArrowUp"].includes(event.key) && tag === "BODY") textKey(event);
  });
}

async function start() {
  prepare(await readData());
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  byId("app").hidden = false;
  state.stage = report.data.stages.length - 1;
  state.fn = Math.max(nowProgramFunctions().findIndex((each) => each.name === "main"), 0);
  startHead();
  startStages();
  startSplits();
  startText();
  startGraph();
  startDetails();
  startDock();
  startKeys();
  document.body.dataset.ready = "true";
}

start().catch((error) => {
  byId("app").hidden = true;
  byId("failure").hidden = false;
  byId("failure").textContent = `This report cannot be shown: ${error}. A browser of 2023 or later is needed (it must know DecompressionStream).`;
  throw error;
});
