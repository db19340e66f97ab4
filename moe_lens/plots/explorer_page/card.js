// Beside the grid: what ran for the token under the cursor; the card of an expert.

let read = "";
function showReadout(box, state, pick) {
  const { at } = state, reads = `${at} ${state.run} ${state.row}`;
  if (read === reads) return;
  read = reads;
  if (at < 0) {
    renew(box, element("p", { class: "token-name" }, "Point at a token"),
      element("p", { class: "facts" }, "Click to keep it; an expert in the grid has a card. Press ? for help and keys."));
    return;
  }
  const run = RUNS[state.run], row = state.row;
  const facts = [];
  for (const [name, words] of [["entropy", "entropy"], ["margin", "margin"]])
    if (run[name]) facts.push(element("span", {}, `${words} `, element("b", {}, written(valueAt(run, name, row, at))), name === "entropy" ? " nats" : ""));
  if (SCORES) facts.push(element("span", {}, "mean score ", element("b", {}, signed(valueAt(run, "score", row, at)))));
  if (RUNS.length > 1) facts.push(element("span", {}, "changed ", element("b", {}, at < N_SHARED ? percent(valueAt(run, "change", row, at)) : "\u2013")));
  const name = element("p", { class: "token-name" }, element("bdi", {}, inline(run.tokens[at])), element("small", {}, `  token ${at + run.first}${RUNS.length > 1 ? `, ${run.name}` : ""}`));
  const line = element("p", { class: "facts", id: "facts" }, row < 0 ? "mean of all layers" : `layer ${LAYERS[row]}`);
  for (const fact of facts) line.append(" \u00b7 ", fact);
  const lists = row < 0 ? [] : RUNS.filter((each) => at < each.n).map((each) => expertList(each, at, row, pick));
  if (row < 0) lists.push(element("p", { class: "experts" }, "Choose a layer (\u2191 \u2193) to read its experts and weights."));
  renew(box, name, line, ...lists);
}

function expertList(run, at, row, pick) {
  const other = RUNS.length > 1 && at < N_SHARED ? RUNS[1 - run.number] : null;
  const chips = expertsAt(run, row, at).map(({ expert, weight }) => element("button", {
    type: "button", onclick: () => pick({ row, expert }), "data-expert": expert, "data-key": `${run.number} ${expert}`,
    class: other && weightOf(other, row, at, expert) === null ? "chip only" : "chip",
    title: `Card of ${nameOf(row, expert)}${run.weights ? `; weight ${weight}` : ""}`,
  }, element("b", {}, `E${expert}`), run.weights ? element("small", {}, ` ${written(weight)}`) : null));
  return element("div", { class: "experts", "data-run": run.number }, RUNS.length > 1 ? element("span", {}, run.name) : null, ...chips);
}

function showCard(box, state, act) {
  box.hidden = state.expert === null;
  if (state.expert === null) return box.replaceChildren();
  const { row, expert } = state.expert, key = row * N_EXPERTS + expert, verb = PLANNED.get(key);
  const close = element("button", { class: "icon", type: "button", "aria-label": "Close the card", title: "Close (Esc)", "data-key": "close", onclick: act.close }, "\u00d7");
  const parts = [element("div", { class: "card-head" }, element("h2", {}, `Layer ${LAYERS[row]}, expert ${expert}`), close)];
  if (verb) parts.push(element("p", { class: "facts" }, `The plan ${verb}s this expert.`));
  parts.push(element("h3", {}, "In this text"));
  const strips = [];
  for (const run of RUNS) parts.push(...inText(run, row, expert, key, strips, act));
  if (STATS) parts.push(...inStats(key));
  if (SCORES) parts.push(...inScores(key));
  if (state.colour !== "picked") parts.push(element("div", { class: "actions" }, element("button", { class: "plain", type: "button", id: "colour-by", "data-key": "colour", onclick: act.colour }, "Colour the text by this expert")));
  renew(box, ...parts);
  strips.forEach((draw) => draw());
}

function inText(run, row, expert, key, strips, act) {
  const { counts, sums } = usageOf(run), n = counts[key];
  const weight = n && run.weights ? `, mean weight ${written(sums[key] / n)} there` : "";
  const words = element("p", { class: "facts", "data-run": run.number }, RUNS.length > 1 ? `${run.name}: ` : "", "ran at ", element("b", {}, `${n} of ${run.n}`), ` tokens (${percent(n / run.n)})${weight}`);
  if (!n) return [words];
  const at = Array.from({ length: run.n }, (_, pos) => pos).filter((pos) => weightOf(run, row, pos, expert) !== null);
  const canvas = element("canvas", { role: "img", "aria-label": `Where it ran, from the first to the last token, ${run.name}` });
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect(), wanted = ((event.clientX - box.left) / box.width) * run.n;
    act.go(run.number, at.reduce((best, pos) => (Math.abs(pos + 0.5 - wanted) < Math.abs(best + 0.5 - wanted) ? pos : best)));
  });
  strips.push(() => drawStrip(canvas, run, row, expert, at));
  const heaviest = run.weights ? [...at].sort((a, b) => weightOf(run, row, b, expert) - weightOf(run, row, a, expert)) : at;
  const chips = heaviest.slice(0, 14).map((pos) => element("button", { class: "chip", type: "button", "data-at": pos, "data-key": `${run.number} ${pos}`, title: `Go to token ${pos + run.first}`, onclick: () => act.go(run.number, pos) },
    element("bdi", {}, inline(run.tokens[pos])), run.weights ? element("small", {}, ` ${brief(weightOf(run, row, pos, expert))}`) : null));
  if (at.length > chips.length) chips.push(element("span", { class: "facts" }, `and ${at.length - chips.length} more`));
  return [words, element("div", { class: "strip" }, canvas), element("div", { class: "chips" }, ...chips)];
}

function drawStrip(canvas, run, row, expert, at) {
  const width = canvas.parentElement.clientWidth, height = 22;
  if (width <= 0) return;
  const pen = penOn(canvas, width, height), largest = Math.max(...at.map((pos) => weightOf(run, row, pos, expert) || 0)) || 1;
  pen.fillStyle = token("cell");
  pen.fillRect(0, height - 1, width, 1);
  pen.fillStyle = token("accent");
  for (const pos of at) {
    const share = run.weights ? Math.max(weightOf(run, row, pos, expert), 0) / largest : 1;
    pen.fillRect((pos / run.n) * width, height - 2 - share * (height - 3), Math.max(1.5, width / run.n - 1), 1 + share * (height - 3));
  }
}

function inStats(key) {
  if (Number.isNaN(STATS.rate[key])) return [element("h3", {}, "In the statistics"), element("p", { class: "facts" }, "They do not cover this layer.")];
  const weight = Number.isNaN(STATS.weight[key]) ? "" : `, mean weight ${written(STATS.weight[key])} there`;
  const parts = [element("h3", {}, "In the statistics"), element("p", { class: "facts", id: "card-rate" }, "ran at ", element("b", {}, percent(STATS.rate[key])),
    ` of ${STATS.n_tokens.toLocaleString("en")} tokens${weight} (even use: ${percent(K / N_EXPERTS)})`)];
  const { top } = STATS;
  if (!top) return parts;
  const chips = [];
  for (let at = 0; at < top.expert.length; at++)
    if (top.expert[at] === key) chips.push(element("span", { class: "chip", title: `chosen for ${top.count[at]} of ${top.total[at]}` },
      element("bdi", {}, inline(top.texts[top.text[at]])), element("small", {}, ` \u00d7${top.lift[at].toFixed(1)}`)));
  parts.push(element("p", { class: "facts" }, chips.length ? "Tokens that go to it more often than others do:" : "No token goes to it more often than others do."));
  return chips.length ? [...parts, element("div", { class: "chips", id: "top-tokens" }, ...chips)] : parts;
}

function inScores(key) {
  const delta = SCORES.delta[key], head = element("h3", {}, `Score: ${SCORES.label}`);
  if (Number.isNaN(delta)) return [head, element("p", { class: "facts" }, "The scores do not cover this layer.")];
  const words = element("p", { class: "facts", id: "card-score" }, element("b", {}, signed(delta)));
  if (SCORES.low) words.append(` [${signed(SCORES.low[key])}, ${signed(SCORES.high[key])}] (${Number((100 * SCORES.level).toPrecision(6))} % interval), q = ${written(SCORES.q[key])}`);
  const rates = [1, 2].map((number) => `${percent(SCORES[`rate_${number}`][key])} under condition ${number}`);
  return [head, words, interval(key), element("p", { class: "facts" }, `ran at ${rates.join(", ")}`)];
}

// The score and its interval on an axis with zero in the middle.
function interval(key) {
  const limit = [SCORES.delta, SCORES.low, SCORES.high].flatMap((part) => (part ? Array.from(part) : [])).reduce((most, value) => (Number.isFinite(value) ? Math.max(most, Math.abs(value)) : most), 0) || 1;
  const across = (value) => Math.min(Math.max(50 + (48 * value) / limit, 0), 100), colour = SCORES.delta[key] < 0 ? palette().negative[2] : palette().positive[2];
  const svg = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
    return made;
  };
  const drawing = svg("svg", { viewBox: "0 0 100 8", width: "100%", height: 18, preserveAspectRatio: "none", "aria-hidden": "true" });
  drawing.append(svg("rect", { x: 0, y: 3.75, width: 100, height: 0.5, fill: token("line") }), svg("rect", { x: 49.9, y: 0.5, width: 0.3, height: 7, fill: token("muted") }));
  if (SCORES.low && !Number.isNaN(SCORES.low[key] + SCORES.high[key])) drawing.append(svg("rect", { x: across(SCORES.low[key]), y: 3, width: Math.max(across(SCORES.high[key]) - across(SCORES.low[key]), 0.3), height: 2, fill: colour, opacity: 0.45 }));
  drawing.append(svg("rect", { x: across(SCORES.delta[key]) - 0.6, y: 1, width: 1.2, height: 6, fill: colour }));
  return drawing;
}
