// The text: one element a token. Text is only ever set as text, so nothing in it is read as HTML.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// Gives a box new children; what had the focus gets it back by its key, or the text does.
function renew(box, ...children) {
  const held = box.contains(document.activeElement) ? document.activeElement.dataset.key ?? "" : null;
  box.replaceChildren(...children);
  if (held === null) return;
  const again = Array.from(box.querySelectorAll("[data-key]")).find((each) => each.dataset.key === held);
  (again ?? document.querySelector(".tokens")).focus({ preventScroll: true });
}

// Characters that cannot be seen, or that turn the text around them, are written out.
const SIGNS = { "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d" };
const UNSEEN = /[\p{Cc}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]/u;
// An emoji of several, held together by what cannot be seen, is one letter.
const LETTER = /\p{Extended_Pictographic}(?:[\ufe0f\u{1f3fb}-\u{1f3ff}]*\u200d\p{Extended_Pictographic})+|./gsu;
const lettersOf = (text) => text.match(LETTER) ?? [];
function sign(letter) {
  if (SIGNS[letter]) return SIGNS[letter];
  if (!UNSEEN.test(letter) || /^\p{Extended_Pictographic}/u.test(letter)) return null;
  return `\\u${letter.codePointAt(0).toString(16).padStart(4, "0")}`;
}

// As one line, for places beside the text.
function inline(text) {
  const shown = lettersOf(text).map((letter) => sign(letter) ?? letter).join("").replace(/^\p{M}/u, "\u25cc$&");
  return shown.replace(/^ +| +$/g, (spaces) => "\u2423".repeat(spaces.length)) || "\u2205";
}

function labelOf(text) { // null where the text says it
  const label = inline(text);
  return label === text ? null : label;
}

const PIECE = /(.)\((\d)\/([234])\)/gsu; // a piece of a character: its number of how many
function isPiece(tokens, at, [, letter, number, of]) {
  const beside = Number(number) > 1 ? tokens[at - 1] : tokens[at + 1];
  return Number(number) <= Number(of) && Boolean(beside?.includes(`${letter}(${Number(number) > 1 ? Number(number) - 1 : 2}/${of})`));
}

function tokenNodes(tokens, at) {
  const text = tokens[at], nodes = [];
  if (text === "") return [element("span", { class: "odd" }, "\u2205")];
  const plain = (part) => {
    let run = "";
    for (const letter of lettersOf(part)) {
      const shown = sign(letter);
      if (shown === null) { run += letter; continue; }
      nodes.push(run, element("span", { class: "odd" }, shown));
      run = letter === "\n" || letter === "\t" ? letter : "";
    }
    nodes.push(run);
  };
  if (/^\p{M}/u.test(text)) nodes.push("\u25cc"); // else it would stand on another token's letter
  let from = 0;
  for (const found of text.matchAll(PIECE)) {
    if (!isPiece(tokens, at, found)) continue;
    plain(text.slice(from, found.index) + (found[2] === "1" ? found[1] : "")); // the first piece shows the character
    nodes.push(element("i", { class: "part", "data-part": `${found[2]}/${found[3]}` }));
    from = found.index + found[0].length;
  }
  plain(text.slice(from));
  return nodes;
}

const LONG = 600; // tokens that fill a window

// Tokenizers of words keep no spaces: their tokens are set apart.
function hasNoSpaces(tokens) {
  return tokens.length > 1 && !tokens.some((text) => /^ \S|\S $/u.test(text));
}

function buildTexts(reading) {
  for (const run of RUNS) {
    run.spans = run.tokens.map((_, at) =>
      element("span", { class: "t", role: "option", id: `t${run.number}-${at}`, "data-at": at, "aria-selected": "false", "aria-label": labelOf(run.tokens[at]) }, ...tokenNodes(run.tokens, at)));
    const spaced = hasNoSpaces(run.tokens);
    run.box = element("div", {
      class: spaced ? "tokens spaced" : "tokens", dir: "auto", role: "listbox", tabindex: 0, "data-run": run.number,
      "aria-label": RUNS.length > 1 ? `Tokens, ${run.name}` : "Tokens",
    }, ...(spaced ? run.spans.flatMap((span) => [span, " "]) : run.spans));
    run.map = element("canvas", { role: "img", "aria-label": `Map of all layers and tokens, ${run.name}` });
    run.mapWords = element("span");
    run.mapRange = element("span");
    const shown = element("small");
    if (RUNS.length > 1 && N_SHARED < run.n) shown.append(`another text from token ${N_SHARED + run.first} on: not compared`);
    reading.append(element("article", { class: run.n > LONG ? "run long" : "run" },
      RUNS.length > 1 ? element("h2", {}, run.name, shown) : null, run.box,
      element("figure", { class: "map" }, element("figcaption", {}, run.mapWords, run.mapRange), run.map)));
  }
}

function paintText(state) {
  const values = RUNS.map((run) => valuesOf(run, state.colour, state.row, state.expert));
  state.scale = scaleOf(state.colour, values, state.row);
  RUNS.forEach((run, number) => run.spans.forEach((span, at) => {
    const colour = state.scale.colour(values[number][at]);
    span.style.background = colour ?? "";
    span.style.color = colour ? inkOn(colour) : "";
  }));
}

function markText(state) {
  const { expert } = state;
  RUNS.forEach((run) => run.spans.forEach((span, at) => {
    span.classList.toggle("ran", expert !== null && weightOf(run, expert.row, at, expert.expert) !== null);
  }));
}

// Tokens that a text stands in, whichever way the tokenizer cut it.
function tokensWith(run, query) {
  const lower = run.tokens.map((text) => text.toLowerCase()), starts = [];
  const joint = run.box.classList.contains("spaced") && query.includes(" ") ? " " : "";
  let whole = "";
  for (const text of lower) { starts.push(whole.length); whole += text + joint; }
  const wanted = query.toLowerCase(), found = new Set();
  for (let at = whole.indexOf(wanted); at >= 0; at = whole.indexOf(wanted, at + 1)) {
    let number = starts.findLastIndex((start) => start <= at);
    for (; number < lower.length && starts[number] < at + wanted.length; number++) if (starts[number] + lower[number].length > at) found.add(number);
  }
  return Array.from(found).sort((a, b) => a - b);
}
