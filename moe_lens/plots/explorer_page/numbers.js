// The data of the page, and what can be asked of them. Rows are MoE layers, first to last.

const DATA = JSON.parse(document.getElementById("data").textContent);
const LAYERS = DATA.layers, N_LAYERS = LAYERS.length, N_EXPERTS = DATA.n_experts, K = DATA.top_k;
const N_SHARED = DATA.n_shared; // tokens that all runs have in common, from the first on

function unpack(packed) {
  if (packed === null || packed === undefined) return null;
  const bytes = Uint8Array.fromBase64?.(packed.data) ?? Uint8Array.from(atob(packed.data), (letter) => letter.charCodeAt(0)); // older browsers
  const kinds = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array };
  if (packed.dtype !== "bf2") return new kinds[packed.dtype](bytes.buffer);
  const halves = new Uint16Array(bytes.buffer); // bfloat16: the upper half of a float32
  const words = new Uint32Array(halves.length);
  for (let at = 0; at < halves.length; at++) words[at] = halves[at] << 16;
  return new Float32Array(words.buffer);
}

const RUNS = DATA.runs.map((run, number) => ({
  number, name: run.name, tokens: run.tokens, n: run.tokens.length, first: run.first,
  indices: unpack(run.indices), weights: unpack(run.weights), entropy: unpack(run.entropy), margin: unpack(run.margin),
  matrices: new Map(),
}));
const N_MOST = Math.max(...RUNS.map((run) => run.n));
const SCORES = DATA.scores && {
  ...DATA.scores,
  ...Object.fromEntries(["delta", "low", "high", "p", "q", "rate_1", "rate_2"].map((name) => [name, unpack(DATA.scores[name])])),
};
const STATS = DATA.stats && {
  n_tokens: DATA.stats.n_tokens, rate: unpack(DATA.stats.rate), weight: unpack(DATA.stats.weight),
  top: DATA.stats.top && {
    texts: DATA.stats.top.texts,
    ...Object.fromEntries(["expert", "text", "count", "total", "lift"].map((name) => [name, unpack(DATA.stats.top[name])])),
  },
};
const PLANNED = new Map(); // row * N_EXPERTS + expert -> "activate" or "deactivate"
for (const [verb, experts] of Object.entries(DATA.plan ?? {}))
  for (const [row, expert] of experts) PLANNED.set(row * N_EXPERTS + expert, verb);

// The experts that ran, largest weight first; without weights in the router's order. One chosen twice counts once.
function expertsAt(run, row, pos) {
  const start = (row * run.n + pos) * K, found = new Map();
  for (let at = start; at < start + K; at++) {
    const expert = run.indices[at];
    found.set(expert, (found.get(expert) ?? 0) + (run.weights ? run.weights[at] : 0));
  }
  const list = Array.from(found, ([expert, weight]) => ({ expert, weight: run.weights ? weight : NaN }));
  return run.weights ? list.sort((a, b) => b.weight - a.weight) : list;
}

function weightOf(run, row, pos, expert) { // null: did not run; NaN: ran with a weight that is not known
  const start = (row * run.n + pos) * K;
  let weight = null;
  for (let at = start; at < start + K; at++) if (run.indices[at] === expert) weight = run.weights ? (weight ?? 0) + run.weights[at] : NaN;
  return weight;
}

function topAt(run, row, pos) { // the first of expertsAt, without making the list
  const start = (row * run.n + pos) * K, { weights } = run;
  if (!weights) return { expert: run.indices[start], weight: NaN };
  const weight = (at) => (run.twice ? weightOf(run, row, pos, run.indices[at]) : weights[at]);
  let top = start, most = weight(start);
  for (let at = start + 1; at < start + K; at++) {
    const next = weight(at);
    if (next > most) { top = at; most = next; }
  }
  return { expert: run.indices[top], weight: most };
}

function isAgain(run, start, at) { // whether the expert at this place came before it, for the same token
  if (run.twice === false) return false;
  for (let before = start; before < at; before++) if (run.indices[before] === run.indices[at]) return true;
  return false;
}

function ranAt(run, row, pos, expert) {
  const start = (row * run.n + pos) * K;
  for (let at = start; at < start + K; at++) if (run.indices[at] === expert) return true;
  return false;
}

// Whether any token has an expert twice, which routers never choose and hooks may: once known, others look less.
for (const run of RUNS) run.twice = run.indices.some((_, at) => isAgain(run, at - (at % K), at));

// What colours can mean. A matrix has a value for each row and token, NaN where there is none.
const COLOURS = {
  expert: {
    label: RUNS[0].weights ? "expert with the largest weight" : "expert listed first",
    says: RUNS[0].weights ? "The expert that counts most; the experts that do so most often have colours of their own."
      : "The first expert in the router's order: this record holds no weights.",
    kind: "names", known: () => true, value: (run, row, pos) => topAt(run, row, pos).expert,
  },
  weight: {
    label: "largest weight", says: "The largest routing weight of the token.",
    kind: "sequence", from: 0, known: (run) => run.weights, value: (run, row, pos) => topAt(run, row, pos).weight,
  },
  entropy: {
    label: "router entropy (nats)", says: "How undecided the router is: entropy of the softmax of its logits, from 0 to ln of the number of experts.",
    kind: "sequence", known: (run) => run.entropy, value: (run, row, pos) => run.entropy[row * run.n + pos],
  },
  margin: {
    label: "routing margin", says: "How far the token is from other experts: the smallest change of one selection score (of a logit, in nats, on most routers) that changes the choice.",
    kind: "sequence", from: 0, most: 0.98, known: (run) => run.margin, value: (run, row, pos) => run.margin[row * run.n + pos],
  },
  score: {
    label: "mean score of the experts that ran", says: SCORES ? `Mean over the experts that ran of: ${SCORES.label}.` : "",
    kind: "signed", known: () => SCORES, value: meanScore,
  },
  change: {
    label: "experts that changed (share)", says: "Share of the token's experts that did not run for it in the other run, from 0 to 1.",
    kind: "sequence", from: 0, to: 1, known: () => RUNS.length > 1, value: changedShare,
  },
  picked: {
    label: "weight of the picked expert", says: "Pick an expert in the grid: its routing weight, 0 where it did not run.",
    kind: "sequence", from: 0, known: () => true, value: () => NaN,
  },
};
const isKnown = (colour) => RUNS.some((run) => COLOURS[colour].known(run));

function meanOverExperts(run, row, pos, value) {
  const start = (row * run.n + pos) * K;
  let sum = 0, n = 0;
  for (let at = start; at < start + K; at++) if (!isAgain(run, start, at)) { sum += value(run.indices[at]); n++; }
  return sum / n;
}

function meanScore(run, row, pos) {
  return meanOverExperts(run, row, pos, (expert) => SCORES.delta[row * N_EXPERTS + expert]);
}

function changedShare(run, row, pos) {
  if (pos >= N_SHARED) return NaN; // another text from here on
  const other = RUNS[1 - run.number];
  return meanOverExperts(run, row, pos, (expert) => (ranAt(other, row, pos, expert) ? 0 : 1));
}

function matrix(run, colour, picked = null) {
  const name = colour === "picked" && picked ? `picked ${picked.row} ${picked.expert}` : colour;
  if (run.matrices.has(name)) return run.matrices.get(name);
  const values = new Float64Array(N_LAYERS * run.n).fill(NaN);
  const { known, value } = COLOURS[colour];
  if (colour === "picked" && picked) {
    for (let pos = 0; pos < run.n; pos++) {
      const weight = weightOf(run, picked.row, pos, picked.expert);
      values[picked.row * run.n + pos] = weight === null ? 0 : run.weights ? weight : 1;
    }
  } else if (known(run)) {
    for (let row = 0; row < N_LAYERS; row++)
      for (let pos = 0; pos < run.n; pos++) values[row * run.n + pos] = value(run, row, pos);
  }
  for (const old of run.matrices.keys()) if (old.startsWith("picked")) run.matrices.delete(old);
  run.matrices.set(name, values);
  return values;
}

// Of each token: its value in one layer, or the mean of those layers (row -1) where it is finite.
function valuesOf(run, colour, row, picked) {
  const whole = matrix(run, colour, picked);
  if (row >= 0) return whole.subarray(row * run.n, (row + 1) * run.n);
  return Float64Array.from({ length: run.n }, (_, pos) => meanAt(whole, run.n, pos));
}

function meanAt(whole, n, pos) {
  let sum = 0, finite = 0;
  for (let at = pos; at < whole.length; at += n) if (Number.isFinite(whole[at])) { sum += whole[at]; finite++; }
  return finite ? sum / finite : NaN;
}

function valueAt(run, colour, row, pos) { // one token of valuesOf
  const whole = matrix(run, colour);
  return row < 0 ? meanAt(whole, run.n, pos) : whole[row * run.n + pos];
}

// How often each expert ran in this text, with which weights; row * N_EXPERTS + expert.
function usageOf(run) {
  if (run.usage) return run.usage;
  const counts = new Uint32Array(N_LAYERS * N_EXPERTS), sums = new Float64Array(N_LAYERS * N_EXPERTS);
  const first = new Uint32Array(N_LAYERS * N_EXPERTS); // at how many tokens it is the one with the largest weight
  for (let row = 0; row < N_LAYERS; row++)
    for (let pos = 0; pos < run.n; pos++) {
      const start = (row * run.n + pos) * K;
      for (let at = start; at < start + K; at++) {
        const key = row * N_EXPERTS + run.indices[at];
        if (!isAgain(run, start, at)) counts[key]++;
        sums[key] += run.weights ? run.weights[at] : NaN;
      }
      first[row * N_EXPERTS + topAt(run, row, pos).expert]++;
    }
  return (run.usage = { counts, sums, first });
}

function written(number, digits = 3) {
  if (number === null || Number.isNaN(number)) return "\u2013";
  if (!Number.isFinite(number)) return number > 0 ? "\u221e" : "\u2212\u221e";
  const text = number !== 0 && Math.abs(number) < 0.001 ? number.toExponential(1) : number.toFixed(digits);
  return text.replace("-", "\u2212");
}
const brief = (number) => (Number.isFinite(number) ? number.toFixed(2).replace("-", "\u2212") : written(number));
const signed = (number, digits = 3) => (number > 0 ? "+" : "") + written(number, digits);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const nameOf = (row, expert) => `L${LAYERS[row]} E${expert}`;
