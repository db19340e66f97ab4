// Under each text, all layers (upward) and the tokens around the cursor, in the colours of the text.

const LEAST = 5; // pixels of a token
const LEFT = 30; // of the labels

function mapGeometry(run, width) {
  const n = Math.min(run.n, Math.max(1, Math.floor((width - LEFT) / LEAST)));
  const height = Math.max(2, Math.min(14, Math.floor((RUNS.length > 1 ? 84 : 150) / N_LAYERS)));
  run.start = Math.min(Math.max(run.start ?? 0, 0), run.n - n);
  return { n, height, step: Math.min((width - LEFT) / n, 26) };
}

function drawMap(run, state) {
  const room = roomIn(run.map.parentElement);
  if (room <= LEFT) return;
  const { n, height, step } = mapGeometry(run, room), { at } = state;
  if (at >= 0 && at < run.n && (at < run.start || at >= run.start + n)) run.start = Math.min(Math.max(at - (n >> 1), 0), run.n - n);
  const { expert, row } = state, picked = state.colour === "picked" && expert ? nameOf(expert.row, expert.expert) : "";
  const drawn = [state.colour, picked, run.start, room, scheme, devicePixelRatio].join();
  if (run.drawn !== drawn) { // the cells stay when only the cursor moves
    run.drawn = drawn;
    run.cells ??= document.createElement("canvas");
    run.cursor = null;
    drawCells(run, state, n);
    const words = state.colour === "expert" ? "All layers; each layer's most frequent experts have colours" : `All layers: ${COLOURS[state.colour].label}`;
    if (run.mapWords.textContent !== words) run.mapWords.textContent = words;
    run.mapRange.textContent = n < run.n ? `tokens ${run.start + run.first}\u2013${run.start + n - 1 + run.first} of ${run.n}` : "";
  }
  const cursor = `${at} ${row}`;
  if (run.cursor === cursor) return;
  run.cursor = cursor;
  const pen = penOn(run.map, room, height * N_LAYERS + 3), down = downIn(height);
  const across = (pos) => LEFT + Math.round((pos - run.start) * step);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(run.cells, LEFT, 1, across(run.start + n) - LEFT, height * N_LAYERS);
  if (step > 8) for (let pos = run.start + 1; pos <= run.start + n; pos++) pen.clearRect(across(pos) - 1, 0, 1, height * N_LAYERS + 1);
  if (height > 5) for (let row = 0; row < N_LAYERS; row++) pen.clearRect(LEFT, down(row) + height - 1, room - LEFT, 1);
  layerLabels(pen, height, down, token("muted"), row);
  pen.strokeStyle = token("ink");
  pen.lineWidth = 1;
  if (row >= 0) pen.strokeRect(LEFT - 0.5, down(row) - 0.5, across(run.start + n) - LEFT, height);
  if (at < run.start || at >= run.start + n) return;
  pen.lineWidth = 1.5;
  pen.strokeRect(across(at) - 0.75, 0.75, across(at + 1) - across(at) + 0.75, height * N_LAYERS + 1);
}

const downIn = (height) => (row) => (N_LAYERS - 1 - row) * height + 1; // the upper edge of a layer

const mapScale = { of: "", scale: null };
function scaleOfAll({ colour, expert }) { // of the values of all layers: the same until another colour is chosen
  const of = colour === "picked" && expert ? nameOf(expert.row, expert.expert) : colour;
  if (mapScale.of !== of) Object.assign(mapScale, { of, scale: scaleOf(colour, RUNS.map((each) => matrix(each, colour, expert)), 0) });
  return mapScale.scale;
}

// A picture of one pixel a cell, which drawMap enlarges: thousands of rectangles would take longer than a frame.
function drawCells(run, state, n) {
  const whole = matrix(run, state.colour, state.expert), scale = scaleOfAll(state), empty = token("cell");
  Object.assign(run.cells, { width: n, height: N_LAYERS });
  const pen = run.cells.getContext("2d"), picture = pen.createImageData(n, N_LAYERS), pixels = new DataView(picture.data.buffer);
  for (let row = 0; row < N_LAYERS; row++)
    for (let pos = 0; pos < n; pos++)
      pixels.setUint32(4 * ((N_LAYERS - 1 - row) * n + pos), pixelOf(scale.colour(whole[row * run.n + run.start + pos], row) ?? empty));
  pen.putImageData(picture, 0, 0);
}
const pixelsOf = new Map();
function pixelOf(hex) { // "#rrggbb" -> its bytes and that it is opaque
  if (!pixelsOf.has(hex)) pixelsOf.set(hex, parseInt(hex.slice(1), 16) * 256 + 255);
  return pixelsOf.get(hex);
}

function layerLabels(pen, height, down, colour, chosen) {
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const every = Math.max(1, Math.ceil(11 / height));
  for (let row = 0; row < N_LAYERS; row++) {
    const near = chosen >= 0 && row !== chosen && Math.abs(row - chosen) < every;
    if (row !== chosen && (row % every || near)) continue;
    pen.fillStyle = row === chosen ? token("ink") : colour;
    pen.fillText(`L${LAYERS[row]}`, LEFT - 5, down(row) + height / 2);
  }
}

function placeInMap(run, event) { // -> {row, at} under the pointer, or null
  const box = run.map.getBoundingClientRect(), { n, height, step } = mapGeometry(run, box.width);
  const at = run.start + Math.floor((event.clientX - box.left - LEFT) / step);
  const row = N_LAYERS - 1 - Math.floor((event.clientY - box.top - 1) / height);
  return at >= run.start && at < run.start + n && row >= 0 && row < N_LAYERS ? { row, at } : null;
}
