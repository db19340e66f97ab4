// What the reader does, and what is drawn anew after it.

const $ = (id) => document.getElementById(id);
const state = {
  colour: "expert", row: N_LAYERS >> 1, // -1: all layers
  pin: -1, hover: -1, run: 0, pinRun: 0, // tokens: the one that was clicked, the one under the pointer; of which run
  expert: null, over: null, // {row, expert}: the one with the card, the one under the pointer
  focus: null, // {run, row, expert}: where the keys are in a grid
  hits: [], hit: -1,
  get at() { return this.hover >= 0 ? this.hover : this.pin; },
};
if (RUNS.length > 1) Object.assign(state, { colour: "change", row: -1 });
else if (SCORES) Object.assign(state, { colour: "score", row: -1 });

function draw({ paint = false, card = false } = {}) {
  if (paint) { paintText(state); showLegend(); }
  for (const run of RUNS) { drawMap(run, state); drawGrid(run, state); }
  showReadout($("readout"), state, pick);
  showCell();
  if (card) { markText(state); showCard($("card"), state, { close: () => pick(null), go, colour: () => setColour("picked") }); }
  for (const run of RUNS) {
    mark(run, "here", state.hover);
    mark(run, "pinned", state.pin);
    const pinned = state.pin >= 0 && state.pin < run.n;
    if (pinned) run.box.setAttribute("aria-activedescendant", run.spans[state.pin].id);
    else run.box.removeAttribute("aria-activedescendant");
  }
}

function mark(run, name, at) {
  const before = run[name];
  if (before) { before.classList.remove(name); if (name === "pinned") before.setAttribute("aria-selected", "false"); }
  const span = at >= 0 && at < run.n ? run.spans[at] : null;
  if (span) { span.classList.add(name); if (name === "pinned") span.setAttribute("aria-selected", "true"); }
  run[name] = span;
}

function say(words) { $("live").textContent = words; }

function go(number, at) { // keeps a token, and brings it into sight in every run
  Object.assign(state, { run: number, pinRun: number, pin: at, hover: -1 });
  draw();
  if (at < 0) return;
  for (const run of RUNS) if (at < run.n) into(run.box, run.spans[at]);
  const run = RUNS[number];
  const ran = state.row < 0 ? "" : `, layer ${LAYERS[state.row]}: ` + expertsAt(run, state.row, at).map(({ expert, weight }) => `expert ${expert}${run.weights ? ` ${brief(weight)}` : ""}`).join(", ");
  say(`token ${at + run.first} ${inline(run.tokens[at])}${ran}`);
}
function into(box, span) { // scrolls the text only, not the page around it
  const place = span.getBoundingClientRect(), top = place.top - box.getBoundingClientRect().top + box.scrollTop, bottom = top + place.height;
  if (top < box.scrollTop + 8) box.scrollTop = top - 30;
  else if (bottom > box.scrollTop + box.clientHeight - 8) box.scrollTop = bottom - box.clientHeight + 30;
}

let opener = null; // what had the focus when a card was opened
function pick(expert) {
  const held = document.activeElement, inCard = $("card").contains(held);
  if (expert && !inCard) opener = held;
  state.expert = expert;
  $("colour").querySelector("[value=picked]").disabled = expert === null;
  if (expert === null && state.colour === "picked") return setColour("expert");
  if (state.colour === "picked") state.row = expert.row;
  $("layer").value = state.row;
  draw({ card: true, paint: state.colour === "picked" });
  if (expert !== null) {
    const below = $("card").offsetTop - $("side").offsetTop - 0.45 * $("side").clientHeight; // keeps the grid in sight
    $("side").scrollTop = Math.max($("side").scrollTop, below);
    say(`Card of layer ${LAYERS[expert.row]}, expert ${expert.expert}`);
  } else if (inCard) (opener?.isConnected && opener !== document.body ? opener : RUNS[state.run].box).focus({ preventScroll: true });
}

function setColour(colour) {
  state.colour = colour;
  $("colour").value = colour;
  if (colour === "expert" && state.row < 0) state.row = N_LAYERS >> 1;
  if (colour === "picked") state.row = state.expert.row;
  $("layer").value = state.row;
  $("layer").querySelector("[value='-1']").disabled = colour === "expert" || colour === "picked";
  draw({ paint: true, card: true });
}

function setLayer(row) {
  state.row = row;
  $("layer").value = row;
  $("readout").style.minHeight = "";
  draw({ paint: true });
  say(row < 0 ? "mean of all layers" : `layer ${LAYERS[row]}`);
}

function stepLayer(step) {
  const least = $("layer").querySelector("[value='-1']").disabled ? 0 : -1;
  setLayer(Math.min(Math.max(state.row + step, least), N_LAYERS - 1));
}

function showLegend() {
  const { scale } = state, box = $("legend");
  if (scale.kind === "names") {
    const { order, firsts } = rankedExperts(state.row);
    const keys = order.slice(0, N_NAMES).map((expert) => element("button", { class: "key", type: "button", "data-key": expert, title: `Card of ${nameOf(state.row, expert)}: first at ${firsts[expert]} tokens`, onclick: () => pick({ row: state.row, expert }) },
      swatch(nameColour(state.row, expert)), `E${expert}`));
    if (order.length > N_NAMES) keys.push(element("span", { class: "key" }, swatch(palette().other), `${order.length - N_NAMES} others`));
    return renew(box, ...keys);
  }
  if (!scale.n) return box.replaceChildren(state.colour === "picked" ? `the picked expert is in layer ${LAYERS[state.expert.row]}` : "no numbers in this layer");
  const stops = scale.kind === "signed" ? [...palette().negative].reverse().concat(palette().positive.slice(1)) : palette().sequence;
  const bar = element("span", { class: "ramp" });
  bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const show = scale.kind === "signed" ? signed : written;
  const words = state.row < 0 ? "mean of all layers" : state.colour === "picked" && state.expert ? nameOf(state.expert.row, state.expert.expert) : `layer ${LAYERS[state.row]}`;
  box.replaceChildren(element("span", { id: "low" }, show(scale.low)), bar, element("span", { id: "high" }, (scale.capped ? "\u2265 " : "") + show(scale.high)), element("span", {}, words));
}
function swatch(colour) {
  const made = element("i");
  made.style.background = colour;
  return made;
}

// Search: "L3 E5" is an expert, everything else is text.
function search(query) {
  const named = /^\s*l(?:ayer)?\s*(\d+)[\s,]*e(?:xpert)?\s*(\d+)\s*$/i.exec(query), found = $("found");
  found.className = "";
  for (const run of RUNS) for (const span of run.spans) span.classList.remove("hit");
  Object.assign(state, { hits: [], hit: -1 });
  if (query.trim() === "") { found.textContent = ""; return; }
  if (named) {
    const row = LAYERS.indexOf(Number(named[1])), expert = Number(named[2]);
    const missing = row < 0 ? `no layer ${named[1]}` : expert >= N_EXPERTS ? `no expert ${expert}` : "";
    found.textContent = missing || "Enter";
    found.className = missing ? "wrong" : "";
    if (!missing) state.hits = [{ row, expert }];
    return;
  }
  for (const run of RUNS) for (const at of tokensWith(run, query)) { state.hits.push({ run: run.number, at }); run.spans[at].classList.add("hit"); }
  found.textContent = state.hits.length ? `${state.hits.length} token${state.hits.length > 1 ? "s" : ""}` : "nothing";
  found.className = state.hits.length ? "" : "wrong";
}

function nextHit(step) {
  if (!state.hits.length) return;
  state.hit = (state.hit + step + state.hits.length) % state.hits.length;
  const hit = state.hits[state.hit];
  if ("expert" in hit) return pick(hit);
  $("found").textContent = `${state.hit + 1} of ${state.hits.length}`;
  go(hit.run, hit.at);
}

function escape() {
  if ($("search").value || document.activeElement === $("search")) {
    $("search").value = "";
    search("");
    RUNS[state.run].box.focus({ preventScroll: true });
  } else if (state.expert) pick(null);
  else go(state.run, -1);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const inSearch = event.target === $("search"), { key } = event;
  if (key === "Escape") { event.preventDefault(); return escape(); }
  if (inSearch) { if (key === "Enter") { event.preventDefault(); nextHit(event.shiftKey ? -1 : 1); } return; }
  if (key === "/") { event.preventDefault(); $("search").focus(); return $("search").select(); }
  if (key === "?") { event.preventDefault(); return $("help").showModal(); }
  if (event.target.closest?.("select, button")) return; // they have uses for the other keys
  const inGrid = RUNS.find((each) => each.grid === event.target);
  if (inGrid) { if (keyInGrid(inGrid, state, key, pick)) { event.preventDefault(); draw(); } return; }
  const run = RUNS[state.run], last = run.n - 1;
  const rightToLeft = getComputedStyle(run.box).direction === "rtl" ? -1 : 1;
  const step = (by) => go(run.number, state.pin < 0 ? (by > 0 ? 0 : last) : Math.min(Math.max(state.pin + by, 0), last));
  const keys = {
    ArrowLeft: () => step(-rightToLeft), ArrowRight: () => step(rightToLeft), Home: () => go(run.number, 0), End: () => go(run.number, last),
    ArrowUp: () => stepLayer(1), ArrowDown: () => stepLayer(-1),
    Enter: () => { if (state.pin >= 0 && state.row >= 0) pick({ row: state.row, expert: expertsAt(run, state.row, state.pin)[0].expert }); },
  };
  if (keys[key]) { event.preventDefault(); keys[key](); }
}

function listen() {
  $("colour").addEventListener("change", (event) => setColour(event.target.value));
  $("layer").addEventListener("change", (event) => setLayer(Number(event.target.value)));
  $("search").addEventListener("input", (event) => search(event.target.value));
  $("help-button").addEventListener("click", () => $("help").showModal());
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = scheme === "dark" ? "light" : "dark";
    readScheme();
    draw({ paint: true, card: true });
  });
  document.addEventListener("keydown", onKey);
  for (const run of RUNS) {
    const hover = (at) => { if (at !== state.hover) { state.hover = at; state.run = at >= 0 ? run.number : state.pinRun; soon(); } };
    run.box.addEventListener("pointerover", (event) => { const span = event.target.closest(".t"); if (span) hover(Number(span.dataset.at)); }); // between two, the first stays
    run.box.addEventListener("pointerleave", () => hover(-1));
    run.box.addEventListener("click", (event) => { const span = event.target.closest(".t"); if (span) go(run.number, Number(span.dataset.at)); });
    run.map.addEventListener("pointermove", (event) => hover(placeInMap(run, event)?.at ?? -1));
    run.map.addEventListener("pointerleave", () => hover(-1));
    run.map.addEventListener("click", (event) => { const place = placeInMap(run, event); if (place) { setLayer(place.row); go(run.number, place.at); } });
    run.grid.addEventListener("pointermove", (event) => over(expertInGrid(run, event)));
    run.grid.addEventListener("pointerleave", () => over(null));
    run.grid.addEventListener("click", (event) => { const found = expertInGrid(run, event); if (found) pick(found); });
    run.grid.addEventListener("mousedown", (event) => { event.preventDefault(); run.box.focus({ preventScroll: true }); }); // arrows go on to move the token
    run.grid.addEventListener("focus", () => { enterGrid(run, state); draw(); });
    run.grid.addEventListener("blur", () => { state.focus = null; soon(); });
  }
  const sized = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      if (target === $("readout")) { target.style.minHeight = `${contentRect.height}px`; continue; } // the grid below it does not jump
      rooms.set(target, contentRect.width);
      soon({ card: state.expert !== null });
    }
  });
  sized.observe($("readout"));
  for (const run of RUNS) for (const canvas of [run.map, run.grid]) sized.observe(canvas.parentElement);
  addEventListener("resize", () => { $("readout").style.minHeight = ""; soon({ card: state.expert !== null }); }); // also where only the screen's fineness changes
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readScheme(); draw({ paint: true, card: true }); });
}

function over(expert) {
  if (state.over === expert || (state.over && expert && state.over.row === expert.row && state.over.expert === expert.expert)) return;
  state.over = expert;
  soon();
}

function showCell() { // of the expert under the pointer, or where the keys are
  const expert = state.over ?? state.focus, words = expert ? cellWords(expert, state) : PLAN_WORDS;
  if ($("cell").textContent !== words) $("cell").textContent = words;
}

let waiting = null;
function soon(what = {}) { // once a frame, however fast the pointer moves
  if (waiting) return void Object.assign(waiting, what);
  waiting = { ...what };
  requestAnimationFrame(() => { const now = waiting; waiting = null; draw(now); });
}

function start() {
  readScheme();
  const tokens = RUNS.map((run) => run.n), same = new Set(tokens).size === 1;
  $("about").textContent = `${same ? tokens[0] : tokens.join(" and ")} token${tokens[0] === 1 && same ? "" : "s"} \u00b7 ${N_LAYERS} layer${N_LAYERS === 1 ? "" : "s"} \u00d7 ${N_EXPERTS} experts, ${K} run for each token`;
  $("notes").textContent = DATA.notes.join(" ");
  $("notes").hidden = !DATA.notes.length;
  for (const [name, { label, says }] of Object.entries(COLOURS)) {
    if (!isKnown(name)) continue;
    $("colour").append(element("option", { value: name, disabled: name === "picked" }, label));
    $("meanings").append(element("dt", {}, label), element("dd", {}, says));
  }
  $("layer").append(element("option", { value: -1 }, "all (mean)"), ...LAYERS.map((layer, row) => element("option", { value: row }, String(layer))));
  buildTexts($("reading"));
  buildGrids($("grids"));
  listen();
  setColour(state.colour);
}
start();
