// Layers (upward) by experts: who ran for the token under the cursor, or how often each ran in this text.

function buildGrids(grids) {
  for (const run of RUNS) {
    run.grid = element("canvas", { role: "grid", tabindex: 0, "aria-rowcount": N_LAYERS, "aria-colcount": N_EXPERTS });
    for (const part of ["noCells", "usageCells"]) run[part] = { canvas: document.createElement("canvas"), drawn: "" };
    run.gridWords = element("span", { class: "what" });
    run.gridKey = element("span");
    grids.append(element("div", { class: "grid" }, element("div", { class: "caption" }, run.gridWords, run.gridKey), run.grid));
  }
}

function caption(run, what, key) {
  const words = RUNS.length > 1 ? `${run.name}: ${what}` : what[0].toUpperCase() + what.slice(1);
  if (run.gridWords.title === words && run.gridKey.textContent === key) return;
  run.gridWords.textContent = words;
  run.gridWords.title = run.gridWords.textContent;
  run.gridKey.textContent = key;
  run.grid.setAttribute("aria-label", `Layers by experts, ${words}${key && `; ${key}`}`);
}

function gridGeometry(width) {
  const most = RUNS.length > 1 ? 210 : 330, few = RUNS.length > 1 ? 20 : 26;
  const height = Math.max(4, Math.min(few, Math.floor(most / N_LAYERS)));
  return { height, step: Math.min((width - LEFT) / N_EXPERTS, 64) };
}

function drawGrid(run, state) {
  const room = roomIn(run.grid.parentElement), { height, step } = gridGeometry(room), whole = height * N_LAYERS + 20;
  if (room <= LEFT) return;
  const gap = step > 7 ? 1 : 0, down = downIn(height);
  const across = (expert) => LEFT + Math.round(expert * step);
  const ofToken = state.at >= 0 && state.at < run.n;
  const high = height - (height > 5 ? 1 : 0);
  const cellWith = (pen) => (row, expert, colour, words) => {
    const left = across(expert), wide = Math.max(across(expert + 1) - left - gap, 1);
    pen.fillStyle = colour;
    pen.fillRect(left, down(row), wide, high);
    if (!words || wide < 32 || high < 14) return;
    Object.assign(pen, { fillStyle: inkOn(colour), textAlign: "center", textBaseline: "middle" });
    pen.fillText(words, left + wide / 2, down(row) + high / 2 + 0.5);
  };
  const drawn = [room, state.row, scheme, devicePixelRatio].join(), below = ofToken ? run.noCells : run.usageCells;
  if (below.drawn !== drawn) { // what stays when the cursor moves
    below.drawn = drawn;
    const pen = penOn(below.canvas, room, whole);
    drawEmpty(pen, state.row, { across, down, height, step, gap });
    if (!ofToken) usageCells(run, cellWith(pen));
  }
  const pen = penOn(run.grid, room, whole);
  pen.drawImage(below.canvas, 0, 0, room, whole);
  if (ofToken) tokenCells(run, state, cellWith(pen));
  else caption(run, "share of this text\u2019s tokens that ran each expert", `most: ${percent(mostUsed(run) / run.n)}`);
  pen.strokeStyle = token("ink");
  pen.lineWidth = 1;
  if (state.row >= 0) pen.strokeRect(LEFT - 0.5, down(state.row) - 0.5, across(N_EXPERTS) - LEFT, height);
  marks(pen, state, run, across, down, height);
}

function drawEmpty(pen, chosen, { across, down, height, step, gap }) {
  const high = height - (height > 5 ? 1 : 0);
  pen.fillStyle = token("cell");
  for (let row = 0; row < N_LAYERS; row++) pen.fillRect(LEFT, down(row), across(N_EXPERTS) - LEFT, high);
  if (gap) for (let expert = 1; expert <= N_EXPERTS; expert++) pen.clearRect(across(expert) - gap, 0, gap, down(-1));
  layerLabels(pen, height, down, token("muted"), chosen);
  expertLabels(pen, across, step, height * N_LAYERS + 12);
}

function tokenCells(run, state, cell) {
  const other = RUNS.length > 1 && state.at < N_SHARED ? RUNS[1 - run.number] : null;
  let largest = 0;
  for (let row = 0; row < N_LAYERS; row++) largest = Math.max(largest, topAt(run, row, state.at).weight || 0);
  for (let row = 0; row < N_LAYERS; row++)
    for (const { expert, weight } of expertsAt(run, row, state.at)) {
      const only = other !== null && weightOf(other, row, state.at, expert) === null;
      const share = run.weights ? Math.max(weight, 0) / (largest || 1) : 1;
      cell(row, expert, along(only ? palette().only : palette().ran, share), run.weights ? brief(weight) : "");
    }
  const where = `token ${state.at + run.first} \u201c\u2068${inline(run.tokens[state.at])}\u2069\u201d`;
  const what = other ? "; orange: this run only" : "";
  const more = `${scheme === "dark" ? "brighter" : "darker"}: more weight`;
  caption(run, where, run.weights ? more + what : what.slice(2));
}

const mostUsed = (run) => usageOf(run).counts.reduce((a, b) => Math.max(a, b), 1);

function usageCells(run, cell) {
  const { counts } = usageOf(run), largest = mostUsed(run);
  for (let row = 0; row < N_LAYERS; row++)
    for (let expert = 0; expert < N_EXPERTS; expert++) {
      const n = counts[row * N_EXPERTS + expert];
      if (n) cell(row, expert, along(palette().ran, n / largest), (n / run.n).toFixed(2));
    }
}

function expertLabels(pen, across, step, y) {
  const steps = [1, 2, 4, 8, 16, 32, 64, 128, 256], every = steps.find((size) => size * step >= 34) ?? 512;
  pen.textAlign = "center";
  pen.fillStyle = token("muted");
  for (let expert = 0; expert < N_EXPERTS; expert += every)
    pen.fillText(`E${expert}`, (across(expert) + across(expert + 1)) / 2, y);
}

// The picked expert, the one under the pointer, and those of the plan: "x" is kept out, "+" is put in.
function marks(pen, state, run, across, down, height) {
  const box = ({ row, expert }, colour, width) => {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    const wide = Math.max(across(expert + 1) - across(expert), 3);
    pen.strokeRect(across(expert) - 0.5, down(row) - 0.5, wide, Math.max(height, 3));
  };
  for (const [key, verb] of PLANNED) {
    const row = Math.floor(key / N_EXPERTS), expert = key % N_EXPERTS;
    const wide = across(expert + 1) - across(expert), x = across(expert) + (wide >= 32 ? 7 : wide / 2) - 0.5, y = down(row) + height / 2 - 0.5, size = Math.max(2, Math.min(wide >= 32 ? 4 : 5, height / 3, wide / 2.4));
    const [a, b] = verb === "deactivate" ? [[-1, -1, 1, 1], [-1, 1, 1, -1]] : [[-1, 0, 1, 0], [0, -1, 0, 1]];
    for (const [colour, width] of [[token("surface"), 4], [token("mark"), 2]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = Math.min(width, size);
      pen.beginPath();
      for (const [x1, y1, x2, y2] of [a, b]) { pen.moveTo(x + x1 * size, y + y1 * size); pen.lineTo(x + x2 * size, y + y2 * size); }
      pen.stroke();
    }
  }
  if (state.over) box(state.over, token("muted"), 1.5);
  if (state.expert) box(state.expert, token("hit"), 2);
  if (state.focus?.run !== run) return;
  box(state.focus, token("surface"), 6);
  box(state.focus, token("accent"), 3);
}

const PLAN_WORDS = ["deactivate", "activate"].filter((verb) => new Set(PLANNED.values()).has(verb))
  .map((verb) => (verb === "deactivate" ? "\u00d7 the plan keeps it out" : "+ the plan puts it in")).join(" \u00b7 ");

function expertInGrid(run, event) { // -> {row, expert} under the pointer, or null
  const box = run.grid.getBoundingClientRect(), { height, step } = gridGeometry(box.width);
  const expert = Math.floor((event.clientX - box.left - LEFT) / step), row = N_LAYERS - 1 - Math.floor((event.clientY - box.top - 1) / height);
  return expert >= 0 && expert < N_EXPERTS && row >= 0 && row < N_LAYERS ? { row, expert } : null;
}

// The keys' own place in a grid. The cell that they are at is an element within the canvas, for readers of the screen.
function enterGrid(run, state) {
  const first = state.at >= 0 && state.at < run.n ? topAt(run, Math.max(state.row, 0), state.at).expert : 0;
  standAt(run, state, state.expert ?? run.stood ?? { row: Math.max(state.row, 0), expert: first });
}

function standAt(run, state, { row, expert }) {
  run.stood = { row, expert };
  state.focus = { run, row, expert };
  const id = `cell${run.number}-${row}-${expert}`, chosen = state.expert?.row === row && state.expert.expert === expert;
  const at = { "aria-rowindex": N_LAYERS - row, "aria-colindex": expert + 1 }; // rows count downward
  run.grid.replaceChildren(element("div", { role: "row", "aria-rowindex": at["aria-rowindex"] },
    element("div", { role: "gridcell", id, ...at, "aria-selected": String(chosen) }, cellWords({ row, expert }, state))));
  run.grid.setAttribute("aria-activedescendant", id);
}

function keyInGrid(run, state, key, pick) { // whether the key has a use here
  const { row, expert } = run.stood, top = N_LAYERS - 1, last = N_EXPERTS - 1;
  const steps = {
    ArrowLeft: [row, Math.max(expert - 1, 0)], ArrowRight: [row, Math.min(expert + 1, last)],
    ArrowUp: [Math.min(row + 1, top), expert], ArrowDown: [Math.max(row - 1, 0), expert],
    Home: [row, 0], End: [row, last], PageUp: [top, expert], PageDown: [0, expert],
  };
  if (key === "Enter" || key === " ") pick({ row, expert });
  else if (!steps[key]) return false;
  const [toRow, toExpert] = steps[key] ?? [row, expert];
  standAt(run, state, { row: toRow, expert: toExpert });
  return true;
}

function cellWords({ row, expert }, state) {
  const words = [nameOf(row, expert)];
  for (const run of RUNS) {
    const whose = RUNS.length > 1 ? `${run.name}: ` : "";
    if (state.at >= 0 && state.at < run.n) {
      const weight = weightOf(run, row, state.at, expert);
      words.push(whose + (weight === null ? "did not run" : run.weights ? `weight ${written(weight)}` : "ran"));
    } else words.push(`${whose}ran at ${usageOf(run).counts[row * N_EXPERTS + expert]} of ${run.n} tokens`);
  }
  if (SCORES) words.push(`score ${signed(SCORES.delta[row * N_EXPERTS + expert])}`);
  const verb = PLANNED.get(row * N_EXPERTS + expert);
  return words.concat(verb ? [`the plan ${verb}s it`] : []).join(" \u00b7 ");
}
