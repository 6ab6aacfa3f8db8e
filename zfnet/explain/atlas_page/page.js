"use strict";
// All text that comes from data (class names, titles) is set with textContent, never as HTML.
const metadata = JSON.parse(document.getElementById("metadata").textContent);
const $ = (id) => document.getElementById(id);
const classes = metadata.classes;
const maps = metadata.layers.flatMap((layer) =>
  layer.maps.map((map, number) => ({ ...map, layer, number, dead: map.top.length === 0 })));
const state = { layer: "", shown: [], map: null };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const percent = (value) => (value > 0 && value < 0.001 ? "under 0.1" : (100 * value).toFixed(value < 0.0995 ? 1 : 0)) + " %";
const favourite = (map) => classes[map.classes[0][0]];
const address = (map) => `#${map.layer.name}/${map.number}`;

// A picture's address: a file beside the page or, where the page is one file, a block of text in it.
const made = new Map();
function picture(path) {
  const block = document.getElementById(path);
  if (!block) return path;
  if (!made.has(path)) {
    const bytes = Uint8Array.from(atob(block.textContent), (letter) => letter.charCodeAt(0));
    made.set(path, URL.createObjectURL(new Blob([bytes], { type: "image/webp" })));
  }
  return made.get(path);
}

// ---- the grid

const largest = (entries, place) => Math.max(0, ...(entries || []).map((entry) => Math.abs(entry[place])));
const NUMBERS = {
  activation: (map) => (map.dead ? 0 : map.top[0][0]),
  mean: (map) => map.mean,
  images: (map) => map.images,
  positions: (map) => map.positions,
  selectivity: (map) => map.selectivity,
  effect: (map) => largest(map.effect, 1),
  match: (map) => (map.nearest && map.nearest.length ? map.nearest[0][2] : 0),
};
// the scores of job=verdict; no bound matches a map without the score, and sorting puts it at the end
const scores = [...new Set(maps.flatMap((map) => Object.keys(map.scores || {})))];
for (const name of scores) NUMBERS[name] = (map) => (name in map.scores ? map.scores[name][0] : NaN);

function matches(map, words) {
  return words.every((word) => {
    const [, name, sign, bound] = word.match(/^([a-z]+)([<>])(-?[\d.]+)%?$/) || [];
    if (name in NUMBERS) {
      const value = NUMBERS[name](map), limit = Number(bound) / (word.endsWith("%") ? 100 : 1);
      return sign === "<" ? value < limit : value > limit;
    }
    if (word === map.layer.name.toLowerCase()) return true;
    if (/^\d+$/.test(word)) return Number(word) === map.number;
    if (word === "dead") return map.dead;
    if (map.dead) return false;
    const names = [map.classes[0][0], ...map.top.map((entry) => entry[2])];
    return names.some((number) => classes[number].toLowerCase().includes(word));
  });
}

const strongest = (map) => (map.dead ? -Infinity : map.top[0][0]);
const ORDERS = {
  number: () => 0,
  activation: (a, b) => strongest(b) - strongest(a),
  // a map that is seldom active looks selective by chance
  selectivity: (a, b) => (b.selectivity - b.chance) - (a.selectivity - a.chance),
  sparsity: (a, b) => (a.dead ? 2 : a.positions) - (b.dead ? 2 : b.positions),
  effect: (a, b) => NUMBERS.effect(b) - NUMBERS.effect(a),
  match: (a, b) => NUMBERS.match(b) - NUMBERS.match(a),
};
const known = (value) => (Number.isNaN(value) ? -Number.MAX_VALUE : value);
for (const name of scores) ORDERS[name] = (a, b) => known(NUMBERS[name](b)) - known(NUMBERS[name](a));

function card(map, kind) {
  const { layer, number } = map;
  const thumbnail = make("span", { className: "thumbnail" });
  if (!map.dead) {
    const columns = layer.columns, rows = Math.ceil(layer.maps.length / columns);
    const [row, column] = [Math.floor(number / columns), number % columns];
    thumbnail.style.backgroundImage = `url("${picture(`sheets/${layer.name}_${kind}.webp`)}")`;
    thumbnail.style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
    thumbnail.style.backgroundPosition =
      `${columns > 1 ? (100 * column) / (columns - 1) : 0}% ${rows > 1 ? (100 * row) / (rows - 1) : 0}%`;
  }
  const about = map.dead ? "never active" : `${map.selectivity.toFixed(2)} ${favourite(map)}`;
  const element = make("button",
    { type: "button", className: map.dead ? "card dead" : "card", onclick: () => { location.hash = address(map); } },
    thumbnail, make("b", { textContent: `${layer.name} · ${number}` }), make("small", { textContent: about }));
  element.dataset.map = address(map);
  element.setAttribute("aria-label", map.dead
    ? `${layer.name} map ${number}: never active`
    : `${layer.name} map ${number}: most active for ${favourite(map)}, selectivity ${map.selectivity.toFixed(2)}`);
  return element;
}

function draw() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  // a class name may hold spaces: try the whole text as one word as well
  const whole = $("search").value.trim().toLowerCase();
  state.shown = maps.filter((map) => (!state.layer || map.layer.name === state.layer)
    && (matches(map, words) || (words.length > 1 && matches(map, [whole]))));
  state.shown.sort(ORDERS[$("sort").value]); // stable: equal maps stay in order of number
  const grid = document.createDocumentFragment();
  for (const map of state.shown) grid.append(card(map, $("kind").value));
  if (!state.shown.length) grid.append(make("p", { className: "nothing", textContent: "No map matches." }));
  $("grid").replaceChildren(grid);
  const dead = state.shown.filter((map) => map.dead).length;
  $("count").textContent = `${state.shown.length.toLocaleString("en")} of ${maps.length.toLocaleString("en")} maps`
    + (dead ? `, ${dead} never active` : "");
}

function chooseLayer(name) {
  state.layer = name;
  for (const button of $("layers").children) button.setAttribute("aria-pressed", button.value === name);
  draw();
}

// ---- one map

function tile(map, entry, place) {
  const [value, image, label, y, x] = entry;
  const views = ["projections", "patches"].map((kind, row) => {
    const view = make("span", { className: map.layer.frame < 48 ? "view pixels" : "view" });
    view.style.backgroundImage = `url("${picture(`maps/${map.layer.name}/${map.number}.webp`)}")`;
    view.style.backgroundSize = `${100 * metadata.top}% 200%`;
    view.style.backgroundPosition = `${metadata.top > 1 ? (100 * place) / (metadata.top - 1) : 0}% ${100 * row}%`;
    return view;
  });
  const button = make("button", { type: "button", onclick: () => showImage(map, place) }, ...views,
    make("small", { textContent: `${value.toPrecision(3)} · ${classes[label]}` }));
  button.setAttribute("aria-label", `Place ${place + 1}: image ${image} of class ${classes[label]}, `
    + `activation ${value} at row ${y}, column ${x}. Show the whole image.`);
  return make("li", {}, button);
}

function showImage(map, place) {
  const [value, image, label, y, x, top, left, bottom, right] = map.top[place];
  $("image").src = picture(`images/${image}.webp`);
  $("image").alt = `Image ${image} of class ${classes[label]}`;
  Object.assign($("box").style, {
    top: `${100 * top}%`, left: `${100 * left}%`, height: `${100 * (bottom - top)}%`, width: `${100 * (right - left)}%`,
  });
  $("caption").textContent = `${metadata.split} image ${image}, ${classes[label]}: activation ${value} `
    + `at (${y}, ${x}); the outline shows what the unit sees`;
  [...$("tiles").children].forEach((item, n) => item.firstChild.setAttribute("aria-pressed", n === place));
}

// rows of a name, a bar and a number; a bar's length is its share of the largest, or of `highest`
function bars(id, rows, highest = Math.max(...rows.map(([, value]) => Math.abs(value)), 1e-12)) {
  $(id).replaceChildren(...rows.flatMap(([name, value, text]) => {
    const bar = make("i", { className: value < 0 ? "negative" : "" });
    bar.style.width = `${Math.min(100, (100 * Math.abs(value)) / highest)}%`;
    return [typeof name === "string" ? make("span", { textContent: name }) : name, make("div", {}, bar),
      make("span", { className: "number", textContent: text || value.toPrecision(3) })];
  }));
}

const hundredths = (value) => (100 * value).toFixed(0);
const scored = ([mean, error]) => hundredths(mean) + (error === null ? "" : ` ± ${hundredths(error)}`);

function histogram(map) {
  const counts = map.histogram || [], most = Math.max(...counts, 1);
  $("histogram").replaceChildren(...counts.map((count, n) => {
    const bar = make("i", { className: n ? "" : "zero" });
    bar.style.height = `${(100 * count) / most}%`;
    const width = map.highest / (counts.length - 1);
    bar.title = `${n ? `${((n - 1) * width).toPrecision(2)} … ${(n * width).toPrecision(2)}` : "not active"}: ${count} images`;
    return bar;
  }));
  $("scale").textContent = `grey: not active; then 0 … ${map.highest}, over ${metadata.sample} images`;
}

function numbers(map) {
  const { layer, top, classes: means, effect, nearest, scores: found, ...plain } = map;
  const named = (entries) => entries && Object.fromEntries(entries.map(([label, value]) => [classes[label], value]));
  const keys = ["activation", "image", "class", "y", "x", "top", "left", "bottom", "right"];
  return {
    weights: metadata.weights, layer: layer.name, ...plain, class_means: named(means), effect: named(effect),
    scores: found && Object.fromEntries(Object.entries(found).map(([name, [mean, error, n]]) => [name, { mean, error, n }])),
    nearest: nearest && nearest.map(([name, number, r]) => ({ layer: name, map: number, r })),
    strongest: top.map((entry) => Object.fromEntries(keys.map((key, n) => [key, key === "class" ? classes[entry[n]] : entry[n]]))),
  };
}

function showMap(map) {
  state.map = map;
  $("name").textContent = `${map.layer.name} · map ${map.number}`;
  $("statistics").textContent = map.dead
    ? `Never active on ${metadata.images.toLocaleString("en")} ${metadata.split} images.`
    : `Active in ${percent(map.images)} of images and at ${percent(map.positions)} of positions; `
      + `mean activation ${map.mean}; class selectivity ${map.selectivity.toFixed(3)} `
      + `(${favourite(map)}; with shuffled labels ${map.chance.toFixed(3)}); `
      + (map.layer.field > metadata.imageSize
        ? `sees up to the whole image (receptive field ${map.layer.field} × ${map.layer.field} px)`
        : `sees ${map.layer.field} × ${map.layer.field} px`);
  $("tiles").replaceChildren(...map.top.map((entry, place) => tile(map, entry, place)));
  $("detail").classList.toggle("empty", map.dead);
  document.querySelector(".columns").hidden = map.dead;
  bars("bars", map.classes.map(([label, mean]) => [classes[label], mean]));
  for (const [id, has] of [["activity", map.histogram], ["effects", map.effect], ["matches", map.nearest],
    ["verdict", metadata.verdict]]) $(id).hidden = !has;
  if (map.histogram) histogram(map);
  bars("effect", (map.effect || []).map(([label, change]) => [classes[label], change]));
  bars("nearest", (map.nearest || []).map(([layer, number, r]) => [make(metadata.other.atlas ? "a" : "span",
    { textContent: `${layer} · ${number}`, href: `${metadata.other.atlas}#${layer}/${number}` }), r]));
  const found = Object.entries(map.scores || {});
  bars("scores", found.map(([name, score]) => [name, score[0], scored(score)]), 1);
  if (metadata.verdict) $("judged").textContent = (found.length
    ? `in hundredths; 0: chance (except for parts), 100: best; ${found.some(([, score]) => score[1] !== null) ? "± standard error over" : "over"} `
      + `${Math.max(...found.map(([, score]) => score[2]))} of its activations`
    : "none of its activations was measured") + `, ${metadata.verdict.split} images, ${metadata.rule}; ${metadata.verdict.name}`;
  $("link").href = address(map);
  $("json").href = `data:application/json,${encodeURIComponent(JSON.stringify(numbers(map), null, 1))}`;
  $("json").download = `${map.layer.name}_${map.number}.json`;
  if (!map.dead) showImage(map, 0);
  if (!$("detail").open) $("detail").showModal();
  $("detail").scrollTop = 0;
}

function move(step) {
  const place = state.shown.indexOf(state.map);
  const next = state.shown[(place + step + state.shown.length) % state.shown.length];
  if (next) location.hash = address(next);
}

function follow() {
  const wanted = maps.find((map) => address(map) === location.hash);
  if (wanted) showMap(wanted);
  else if ($("detail").open) $("detail").close();
}

// ---- start

$("about").textContent = `${metadata.title}: the ${metadata.top} strongest activations of each map over `
  + `${metadata.images.toLocaleString("en")} ${metadata.split} images, rule ${metadata.rule}. `
  + "Below each map: its class selectivity, from 0 to 1, and the class that excites it most; "
  + "sorting by class selectivity uses its excess over shuffled labels.";
for (const name of ["", ...metadata.layers.map((layer) => layer.name)]) {
  $("layers").append(make("button", { type: "button", value: name, textContent: name || "all", onclick: () => chooseLayer(name) }));
}
for (const name of classes) $("names").append(make("option", { value: name }));
for (const id of ["search", "sort", "kind"]) $(id).addEventListener("input", draw);
$("previous").onclick = () => move(-1);
$("next").onclick = () => move(1);
$("close").onclick = () => $("detail").close();
$("detail").addEventListener("close", () => {
  if (!state.map) return;
  const opener = document.querySelector(`[data-map="${address(state.map)}"]`);
  state.map = null;
  history.replaceState(null, "", location.pathname + location.search);
  if (opener) opener.focus();
});
$("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
$("detail").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") move(-1);
  if (event.key === "ArrowRight") move(1);
});
$("theme").onclick = () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};
addEventListener("hashchange", follow);
$("unit").textContent = `mean class output before the softmax, n = ${metadata.ablated} images`;
if (metadata.other) $("other").textContent = `Nearest maps in ${metadata.other.name} (correlation r)`;
for (const [name, has] of [["effect", maps.some((map) => map.effect)], ["match", metadata.other]]) {
  if (!has) $("sort").querySelector(`[value=${name}]`).remove();
}
for (const name of scores) $("sort").append(make("option", { value: name, textContent: `verdict: ${name}` }));
if (scores.length) $("search").title += `; and the verdict's scores, 0 … 1: ${scores.join(", ")}`;
chooseLayer("");
// if the page is one file, the pictures can come after this script
if (document.readyState === "loading") addEventListener("DOMContentLoaded", follow);
else follow();
