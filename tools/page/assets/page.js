const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const layers = data.blocks.flatMap((block) => block.layers);

const MEASURES = {
  share: ["elements that learn now", (layer) => (layer.subnet ? elements(layer.subnet) / elements(layer.shape) : layer.trained === "full" ? 1 : null)],
  reached: ["elements reached so far", (layer) => last(layer)?.reached ?? (layer.trained === "full" ? 1 : null)],
  captured: ["importance held by its group", (layer) => last(layer)?.captured ?? null],
  overlap: ["overlap with the selection before", (layer) => last(layer)?.jaccard ?? null],
};
const elements = (shape) => shape.reduce((product, size) => product * size, 1);
const last = (layer) => layer.selections[layer.selections.length - 1];

// -- the head of the page ---------------------------------------------------------------------------------------------

function showFacts() {
  document.title = `${data.title} · losia_fx`;
  at("title").textContent = data.title;
  at("round").textContent = `${data.round[0].toUpperCase()}${data.round.slice(1)}.`;
  const learning = data.totals.subnet + data.totals.full;
  const facts = {
    model: data.model,
    parameters: count(data.totals.all),
    "learn at a time": `${count(learning)} (${percent(learning / data.totals.all)})`,
    "rank factor": `${data.config.rank_factor}`,
    "slot (period)": `${data.config.period} steps`,
    [data.moved ? "steps trained" : "steps planned"]: String(data.steps),
  };
  at("facts").append(...Object.entries(facts).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  if (data.notes.length) {
    at("notes").hidden = false;
    at("notes").querySelector("ul").append(...data.notes.map((note) => make("li", {}, note)));
  }
}

// -- the map ----------------------------------------------------------------------------------------------------------

function tile(layer) {
  const button = make("button", { type: "button", class: `tile ${layer.trained}`, "aria-expanded": "false", "aria-controls": "layer", "data-name": layer.name, title: layer.name },
    make("b", {}, layer.label), make("span", {}, make("span", {}, dims(layer.shape)), make("span", { class: "amount" })),
    make("i", { class: "meter", "aria-hidden": "true" }, make("i")));
  button.addEventListener("click", () => open(layer, button));
  return button;
}

function showMap() {
  const choose = at("measure");
  for (const [key, [label]] of Object.entries(MEASURES)) {
    if (data.moved || key === "share") choose.append(make("option", { value: key }, label));
  }
  choose.value = data.moved ? "reached" : "share";
  choose.addEventListener("change", fillMeters);
  for (const block of data.blocks) {
    const groups = [...new Set(block.layers.map((layer) => layer.group).filter((group) => group !== null))];
    const said = groups.length ? `group ${groups.join(", ")}` : "no group";
    at("blocks").append(make("div", { class: "block" }, make("h3", {}, block.label, make("small", {}, said)),
      make("ul", { class: "tiles" }, ...block.layers.map((layer) => make("li", {}, tile(layer))))));
  }
  at("blocks").addEventListener("keydown", moveFocus);
  fillMeters();
}

function fillMeters() {
  const [label, measure] = MEASURES[at("measure").value];
  document.querySelectorAll(".tile").forEach((button, index) => {
    const layer = layers[index], share = measure(layer);
    button.querySelector(".amount").textContent = share === null ? (layer.trained === "frozen" ? "frozen" : "") : percent(share);
    button.querySelector(".meter i").style.width = `${100 * (share ?? 0)}%`;
    const how = { subnet: "learns through a subnet", full: "learns in full", frozen: "frozen" }[layer.trained];
    button.setAttribute("aria-label", `${layer.name}, ${dims(layer.shape)}, ${how}${share === null ? "" : `, ${label}: ${percent(share)}`}`);
  });
}

/** Arrow keys: left and right along the map, up and down to the nearest weight of the next line. */
function moveFocus(event) {
  const tiles = [...document.querySelectorAll(".tile")], here = tiles.indexOf(document.activeElement);
  if (here < 0) return;
  let target = null;
  if (event.key === "ArrowRight") target = tiles[here + 1];
  if (event.key === "ArrowLeft") target = tiles[here - 1];
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const sign = event.key === "ArrowDown" ? 1 : -1, box = tiles[here].getBoundingClientRect();
    const beyond = tiles.map((other) => [other, other.getBoundingClientRect()]).filter(([, its]) => sign * (its.top - box.top) > 4);
    const far = ([, its]) => Math.abs(its.top - box.top) * 1000 + Math.abs(its.left - box.left);
    target = beyond.sort((a, b) => far(a) - far(b))[0]?.[0];
  }
  if (target) { event.preventDefault(); target.focus(); }
}

// -- one layer --------------------------------------------------------------------------------------------------------

let opened = null;

function open(layer, button) {
  close(false);
  opened = button;
  button.setAttribute("aria-expanded", "true");
  document.querySelector("main").classList.add("open");
  at("layer").hidden = false;
  at("layer-name").textContent = layer.name;
  at("layer-body").replaceChildren(about(layer), ...subnet(layer), ...graphs(layer));
  redraw();
  at("layer").scrollTop = 0;
  at("layer-name").focus({ preventScroll: true });
  if (at("layer").getBoundingClientRect().top > innerHeight * 0.6 || at("layer").getBoundingClientRect().top < 0) at("layer").scrollIntoView({ block: "start" });
}

function close(back) {
  if (!opened) return;
  opened.setAttribute("aria-expanded", "false");
  document.querySelector("main").classList.remove("open");
  at("layer").hidden = true;
  redraw = () => {};
  if (back) opened.focus();
  opened = null;
}

const pair = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));

function about(layer) {
  const list = make("dl", { class: "pairs" }, pair("shape", dims(layer.shape)), pair("trained", layer.trained === "frozen" ? "frozen" : layer.trained === "full" ? "in full" : "through a subnet"));
  if (layer.subnet) list.append(pair("subnet", dims(layer.subnet)), pair("group", String(layer.group)));
  if (layer.used) list.append(pair("used by", layer.used));
  list.append(pair("why", layer.why));
  if (layer.cost) {
    const { full, subnet: small, whole_x: whole, kept_x: kept } = layer.cost;
    list.append(pair("FLOPs of its gradient", `${count(small)} instead of ${count(full)} (${percent(small / full)})`),
      pair("kept of x", `${bytes(kept)} instead of ${bytes(whole)}`));
  }
  return list;
}

/** What redraws the canvases of the open layer, after a step or a change of colours. */
let redraw = () => {};

function subnet(layer) {
  if (!layer.selections.length) return [];
  const experts = layer.shape.length === 3 ? layer.shape[0] : 1;
  const [out, inner] = layer.shape.slice(-2), moves = layer.selections, several = moves.length > 1;
  const map = make("canvas", { role: "img" }), rowTime = make("canvas", { role: "img" }), colTime = make("canvas", { role: "img" });
  const slider = make("input", { type: "range", min: 0, max: moves.length - 1, value: moves.length - 1, "aria-label": "selection" });
  const chooser = make("select", { "aria-label": "expert" }, ...Array.from({ length: experts }, (_, n) => make("option", { value: n }, `expert ${n}`)));
  const said = make("output"), caption = make("figcaption");
  const end = Math.max(data.steps, moves[moves.length - 1].step + 1);
  redraw = () => {
    const expert = Number(chooser.value), move = moves[Number(slider.value)];
    drawSubnet(map, bits(move.rows, out, expert), bits(move.cols, inner, expert));
    map.setAttribute("aria-label", `Subnet of ${layer.name} from step ${move.step} on: ${dims(layer.subnet)} of ${dims(layer.shape)}`);
    const known = [`from step ${move.step} on`, move.jaccard === null ? "the first, by chance" : `overlap ${percent(move.jaccard)}`,
      move.captured === null ? null : `group holds ${percent(move.captured)} of the importance`, `${percent(move.reached)} reached so far`];
    said.textContent = known.filter(Boolean).join(" · ");
    slider.setAttribute("aria-valuetext", said.textContent);
    if (several) {
      const edges = moves.map((each) => each.step);
      drawHistory(rowTime, moves.map((each) => bits(each.rows, out, expert)), edges, end);
      drawHistory(colTime, moves.map((each) => bits(each.cols, inner, expert)), edges, end);
      rowTime.setAttribute("aria-label", `Rows of the subnet over ${data.steps} steps`);
      colTime.setAttribute("aria-label", `Columns of the subnet over ${data.steps} steps`);
    }
  };
  for (const control of [slider, chooser]) control.addEventListener("input", () => redraw());
  caption.textContent = `rows (${out}) downwards, columns (${inner}) across; the strips show each by itself`;
  const parts = [make("h3", {}, several ? "Subnet, slot by slot" : "First subnet"),
    make("div", { class: "stepper" }, ...(experts > 1 ? [chooser] : []), ...(several ? [slider] : []), said)];
  const figure = make("figure", { class: "figure" }, map, caption);
  if (!several) {
    const note = data.moved ? "It has not moved in this run." : "Chosen by chance. A run shows how it moves: losia-fx page RUN.";
    return [...parts, make("div", { class: "columns" }, figure, make("p", { class: "hint" }, note))];
  }
  const history = make("div", {}, make("figure", { class: "figure" }, rowTime, make("figcaption", {}, "rows over the steps of the run")),
    make("figure", { class: "figure", style: { marginTop: "10px" } }, colTime, make("figcaption", {}, "columns over the steps of the run")));
  return [...parts, make("div", { class: "columns" }, figure, history), ...charts(layer)];
}

function charts(layer) {
  const overlap = layer.selections.slice(1).map((move) => ({ step: move.step, share: move.jaccard }));
  const held = layer.selections.slice(1).map((move) => ({ step: move.step, share: move.captured }));
  const made = [make("div", {}, make("h3", {}, "Overlap with the selection before (Jaccard)"), bars(overlap, "Jaccard overlap of each selection with the one before"))];
  if (held.some((move) => move.share !== null)) {
    made.push(make("div", {}, make("h3", {}, "Importance that the group's subnets held"), bars(held, "Share of the group's importance held at each selection", "warm")));
  }
  const rows = layer.selections.map((move) => make("tr", {}, make("th", { scope: "row" }, String(move.step)), make("td", {}, percent(move.jaccard)), make("td", {}, percent(move.captured)), make("td", {}, percent(move.reached))));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...["from step", "overlap", "importance", "reached"].map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows));
  return [make("div", { class: "columns" }, ...made), make("details", {}, make("summary", {}, "The same as a table"), make("div", { class: "scroll" }, table))];
}

function graphs(layer) {
  if (!layer.after.length) return [];
  const side = (title, lines) => make("div", {}, make("h3", {}, title), make("ul", { class: "nodes" }, ...lines.map(nodeLine)));
  return [make("div", { class: "columns graphs" }, side("Nodes before", layer.before), side("Nodes after the passes", layer.after))];
}

function nodeLine(line) {
  const sign = { added: "+", removed: "−" }[line.mark] ?? "";
  const spoken = line.mark ? `${line.mark}: ` : "";
  return make("li", { class: line.mark }, make("span", { class: "sign", "aria-label": spoken }, sign), `${line.name} = ${line.op}`,
    make("span", { class: "takes" }, line.inputs ? `(${line.inputs})` : ""), make("span", { class: "value" }, line.value ? `  ${line.value}` : ""));
}

// -- the forecast -----------------------------------------------------------------------------------------------------

function showForecast() {
  const inputs = Object.entries(data.inputs).map(([name, shape]) => `${name} ${dims(shape)}`).join(", ");
  at("forecast-note").textContent = `For a step of ${inputs}, with AdamW. FLOPs are those of the products of these weights, the cost of profiling spread over a round.`;
  const most = Math.max(...data.methods.map((method) => method.bytes)), parts = Object.keys(data.parts);
  const names = ["method", "memory by part", "memory", "kept for backward", "learns", "FLOPs a step"];
  const head = make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name))));
  const body = make("tbody", {}, ...data.methods.map((method) => {
    const stack = make("div", { class: "stack", role: "img", "aria-label": parts.filter((part) => method.memory[part]).map((part) => `${data.parts[part]} ${bytes(method.memory[part])}`).join(", ") },
      ...parts.map((part, index) => make("i", { title: `${data.parts[part]}: ${bytes(method.memory[part])}`, style: { width: `${(100 * method.memory[part]) / most}%`, background: `var(--part-${index})` } })));
    return make("tr", { class: method.note === "as here" ? "here" : "" }, make("th", { scope: "row" }, method.name, " ", make("small", {}, method.note)),
      make("td", {}, stack), ...[bytes(method.bytes), bytes(method.memory.activations), count(method.trained), count(method.all_flops)].map((value, index) => make("td", { "data-label": names[index + 2] }, value)));
  }));
  at("methods").append(head, body);
  at("parts").append(...parts.map((part, index) => make("span", {}, make("i", { class: "swatch", style: { background: `var(--part-${index})` } }), data.parts[part])));
  at("periods").append(
    make("thead", {}, make("tr", {}, ...["period", "steps in a round", `rounds in ${data.steps} steps`].map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...data.periods.map((each) => make("tr", { class: each.here ? "here" : "" }, make("th", { scope: "row" }, `${each.period} steps`),
      make("td", {}, String(each.round)), make("td", {}, each.rounds < 1 ? "less than one: some never move" : each.rounds.toFixed(1))))));
}

showFacts();
showMap();
showForecast();
at("close").addEventListener("click", () => close(true));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") close(true); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());

// page.html#model.layers.0.mlp.up_proj.weight opens with that weight
const wanted = document.querySelector(`.tile[data-name="${CSS.escape(decodeURIComponent(location.hash.slice(1)))}"]`);
if (wanted) wanted.click();
