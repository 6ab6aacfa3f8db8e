"use strict";
const $ = (id) => document.getElementById(id);
const quiz = JSON.parse($("metadata").textContent);
const buttons = [...document.querySelectorAll("#queries button")];
const key = `quiz ${quiz.id}`;
let answers = load(); // one for each trial so far: what was chosen, and after how many seconds
let since = 0;
let open = true; // whether the trial that is shown waits for its answer

function load() { // some browsers keep nothing for pages from the file system
  try { return JSON.parse(localStorage.getItem(key)) || []; } catch { return []; }
}

function keep() {
  try { localStorage.setItem(key, JSON.stringify(answers)); } catch { /* the page works without */ }
}

function make(name, properties) {
  return Object.assign(document.createElement(name), properties);
}

function picture(image, source) { // small ones show their pixels
  image.onload = () => image.classList.toggle("pixels", image.naturalWidth < image.width / 2);
  image.src = source;
}

function cell(values) { // values: 1 for a right choice, else 0; trials show different maps, so they are independent
  const n = values.length;
  if (!n) return "";
  const mean = values.reduce((a, b) => a + b, 0) / n;
  const error = n > 1 ? ` ± ${Math.round(100 * Math.sqrt(mean * (1 - mean) / (n - 1)))}` : "";
  return `${Math.round(100 * mean)}${error} (${n})`;
}

function rights(layer, condition) {
  return answers.map((given, n) => [quiz.trials[n], given])
    .filter(([trial]) => (!layer || trial.layer === layer) && (!condition || trial.condition === condition))
    .map(([trial, given]) => Number(given.choice === trial.answer));
}

function showScore() {
  const row = (first, ...cells) => {
    const line = make("tr", {});
    line.append(make("th", { textContent: first, scope: "row" }), ...cells.map((c) => make("td", { textContent: c })));
    return line;
  };
  const head = make("tr", {});
  head.append(...["pictures", ...quiz.layers, ...(quiz.layers.length > 1 ? ["all"] : [])]
    .map((name) => make("th", { textContent: name, scope: "col" })));
  const conditions = Object.entries(quiz.conditions);
  $("score").replaceChildren(
    head,
    ...conditions.map(([condition, name]) => row(name, ...quiz.layers.map((layer) => cell(rights(layer, condition))),
      ...(quiz.layers.length > 1 ? [cell(rights("", condition))] : []))),
  );
  $("published").replaceChildren(...quiz.published.map((one) => row(`${one.name} (${one.source})`,
    `${Math.round(100 * one.accuracy)} ± ${Math.round(100 * one.error)}`)));
  $("save").href = `data:application/json,${encodeURIComponent(JSON.stringify(record(), null, 1))}`;
  $("save").download = "quiz_answers.json";
}

function record() {
  const { id, title, weights, split } = quiz;
  return { quiz: id, title, weights, split, answers: answers.map((given, n) => {
    const { layer, map, condition, answer } = quiz.trials[n];
    return { trial: n + 1, layer, map, condition, choice: given.choice, answer, right: given.choice === answer,
      seconds: given.seconds };
  }) };
}

function show() {
  const trial = quiz.trials[answers.length];
  open = Boolean(trial);
  $("trial").hidden = $("after").hidden = !trial;
  $("next").hidden = true;
  $("answer").textContent = "";
  buttons.forEach((button, n) => {
    button.className = "";
    if (trial) picture(button.querySelector("img"), trial.queries[n]);
  });
  $("pictures").replaceChildren();
  if (!trial) {
    $("number").textContent = `All ${quiz.trials.length} questions are answered; thank you.`;
    return;
  }
  $("number").textContent = `Question ${answers.length + 1} of ${quiz.trials.length}: `
    + "these pictures show what excites a map most. Which of the two images excites it more?";
  for (const [kind, source] of trial.references) {
    const figure = make("figure", {});
    const image = make("img", { alt: kind });
    figure.append(image, make("figcaption", { textContent: kind }));
    $("pictures").append(figure);
    picture(image, source);
  }
  since = performance.now();
}

function choose(choice) {
  if (!open) return;
  open = false;
  const trial = quiz.trials[answers.length];
  answers.push({ choice, seconds: Math.round((performance.now() - since) / 100) / 10 });
  keep();
  buttons[trial.answer].className = "strong";
  if (choice !== trial.answer) buttons[choice].className = "wrong";
  $("answer").textContent = `${choice === trial.answer ? "Right" : "Wrong"}: left ${trial.values[0]}, right ${trial.values[1]}. `
    + `The pictures were ${quiz.conditions[trial.condition]}; the map is `;
  const name = `${trial.layer} · ${trial.map}`;
  $("answer").append(quiz.atlas ? make("a", { textContent: name, href: `${quiz.atlas}#${trial.layer}/${trial.map}` }) : name);
  $("next").hidden = false;
  showScore();
}

buttons.forEach((button, n) => { button.onclick = () => choose(n); });
$("next").onclick = show;
$("again").onclick = () => { answers = []; keep(); showScore(); show(); };
$("theme").onclick = () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};
document.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const choice = { ArrowLeft: 0, 1: 0, ArrowRight: 1, 2: 1 }[event.key];
  if (choice !== undefined && open) choose(choice);
  else if (event.key === "Enter" && !$("next").hidden && event.target.tagName !== "A") show();
  else return;
  event.preventDefault(); // a focused button would be pressed as well
};
$("about").textContent = `${quiz.title}, ${quiz.split} images. `;
if (quiz.atlas) $("about").append(make("a", { textContent: "atlas of the maps", href: quiz.atlas }));
showScore();
show();
