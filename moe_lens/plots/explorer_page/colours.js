// Colours, for light and dark; colour-blind readers can tell them apart (after Okabe and Ito).

const PALETTES = {
  light: {
    sequence: ["#f4f6f8", "#c8e0f1", "#86bbe1", "#3a8ac6"],
    positive: ["#f5f4f1", "#c3dcee", "#86bbe1", "#3a8ac6"], negative: ["#f5f4f1", "#f7d6bb", "#eda36c", "#d9722c"],
    ran: ["#b9d9ef", "#5ba3d6", "#1f6ca8", "#0c4a7c"], only: ["#f7d6bb", "#eb9a5f", "#cc6420", "#8f3d04"],
    names: ["#f0b64a", "#90cdf0", "#55b892", "#f1e67a", "#3f88be", "#de8149", "#d998ba"], other: "#e4e6e8",
  },
  dark: {
    sequence: ["#202429", "#26557c", "#4b98d0", "#a8d8ff"],
    positive: ["#26292d", "#275a84", "#4b98d0", "#a8d8ff"], negative: ["#26292d", "#7a431c", "#c96f31", "#ffbc85"],
    ran: ["#22496a", "#3379ad", "#62b0e8", "#b8e0ff"], only: ["#63381a", "#a85c28", "#ec8f4b", "#ffcb9e"],
    names: ["#c68a16", "#4793c2", "#1b8a69", "#b3a832", "#2b6da3", "#bf5f25", "#a86489"], other: "#383d43",
  },
};
const N_NAMES = PALETTES.light.names.length;

let scheme = "light";
const styles = new Map(); // of the scheme: asking the browser each time would be slow
function readScheme() {
  const chosen = document.documentElement.dataset.theme;
  scheme = chosen ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  styles.clear();
}
const palette = () => PALETTES[scheme];
function token(name) {
  if (!styles.has(name)) styles.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return styles.get(name);
}
const parts = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

const STEPS = 256, ramps = new Map();
function along(stops, share) { // 0 to 1 -> a colour between the stops; of what is no number, the first
  if (!ramps.has(stops)) ramps.set(stops, Array.from({ length: STEPS + 1 }, (_, step) => between(stops, step / STEPS)));
  return ramps.get(stops)[Math.round(Math.min(Math.max(share || 0, 0), 1) * STEPS)];
}
function between(stops, share) {
  const place = share * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
  const [from, to] = [parts(stops[low]), parts(stops[low + 1])];
  return "#" + from.map((part, at) => Math.round(part + (to[at] - part) * (place - low)).toString(16).padStart(2, "0")).join("");
}

function luminance(hex) {
  const [r, g, b] = parts(hex).map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const inks = new Map();
function inkOn(hex) { // the one with more contrast, 4.5 : 1 at least
  if (!inks.has(hex)) inks.set(hex, luminance(hex) > 0.179 ? "#000000" : "#ffffff");
  return inks.get(hex);
}

// A scale turns values into colours: {kind, low, high, colour(value, row)}.
function scaleOf(colour, values, row) {
  const { kind, from, to, most } = COLOURS[colour];
  if (kind === "names") return { kind, colour: (expert, at = row) => nameColour(at, expert) };
  let least = Infinity, largest = -Infinity, n = 0;
  for (const part of values) for (const value of part) if (Number.isFinite(value)) { n++; least = Math.min(least, value); largest = Math.max(largest, value); }
  if (most && n) { // a few large ones would make all others look alike
    const finite = Float64Array.from(values.flatMap((part) => Array.from(part.filter(Number.isFinite)))).sort();
    largest = finite[Math.max(0, Math.ceil(most * n) - 1)];
  }
  if (kind === "signed") {
    const limit = Math.max(Math.abs(least), Math.abs(largest)) || 1;
    const paint = (value) => along(value < 0 ? palette().negative : palette().positive, Math.abs(value) / limit);
    return { kind, low: -limit, high: limit, n, colour: (value) => (Number.isNaN(value) ? null : paint(value)) };
  }
  const low = Math.min(from ?? least, least), high = to ?? largest, width = high - low || 1;
  const paint = (value) => along(palette().sequence, (value - low) / width);
  return { kind, low, high, capped: Boolean(most), n, colour: (value) => (Number.isNaN(value) ? null : paint(value)) };
}

// In each layer the experts that come first at most tokens have colours.
const ranks = new Map();
function rankedExperts(row) {
  if (!ranks.has(row)) {
    const firsts = new Float64Array(N_EXPERTS);
    for (const run of RUNS) usageOf(run).first.subarray(row * N_EXPERTS, (row + 1) * N_EXPERTS).forEach((n, at) => (firsts[at] += n));
    const order = Array.from(firsts.keys()).filter((expert) => firsts[expert] > 0).sort((a, b) => firsts[b] - firsts[a] || a - b);
    ranks.set(row, { order, place: new Map(order.map((expert, at) => [expert, at])), firsts });
  }
  return ranks.get(row);
}
function nameColour(row, expert) {
  const place = rankedExperts(row).place.get(expert);
  return place !== undefined && place < N_NAMES ? palette().names[place] : palette().other;
}

// The pen of an empty canvas of this size in pixels of the page, fine enough for the screen.
function penOn(canvas, width, height) {
  const ratio = devicePixelRatio || 1, wide = Math.round(width * ratio), high = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  if (canvas.width !== wide || canvas.height !== high) { // a new size costs a new picture
    Object.assign(canvas, { width: wide, height: high });
    canvas.style.height = `${height}px`;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.font = `11px ${token("font")}`;
  } else pen.clearRect(0, 0, width, height);
  return pen;
}

// How wide the inside of an element is. Asked of the browser once, then told by it: asking while something is
// being changed would lay out the whole page anew.
const rooms = new Map();
function roomIn(box) {
  if (!rooms.has(box)) {
    const style = getComputedStyle(box);
    rooms.set(box, box.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight));
  }
  return rooms.get(box);
}
