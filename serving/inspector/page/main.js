// Puts the parts of the page together: what is asked, what is shown, and what controls change.

import { request, useKey } from "./api.js";
import * as answers from "./answer.js";
import { EXAMPLE } from "./example.js";
import { Heatmap } from "./heatmap.js";
import * as libraries from "./library.js";
import { fromLink, readJson, saveJson, toLink } from "./link.js";
import { Memory, words } from "./memory.js";
import { Pane, tenth } from "./pane.js";
import { listSessions, listTurns, tokensOf } from "./sessions.js";
import { DEFAULTS, change, follow, view } from "./view.js";

const $ = (id) => document.getElementById(id);

const panes = ["this side", "other side"].map((name) => {
  const root = $("pane").content.cloneNode(true).firstElementChild;
  root.setAttribute("aria-label", name);
  root.querySelector("[data-part=text]").setAttribute("aria-label", `The tokens, ${name}`);
  root.querySelector("[data-part=time]").setAttribute("aria-label", `Tokens read so far, ${name}`);
  root.querySelector(".table").setAttribute("aria-label", `Sizes by layer, ${name}`);
  $("panes").append(root);
  return new Pane(root, () => panes.find((pane) => pane.root !== root && pane.memory) ?? null);
});
const [here, there] = panes;
const heatmap = new Heatmap($("heatmap"), $("heat-note"));
let config = null; // the server's lola_config
let asking = null; // what stops the answer that is coming
let hearing = null; // and that of a library
let reading = new AbortController(); // and the reading: a newer one takes its place
let source = null; // the one of a library's answer whose text is shown

function say(text, error = false, where = "status") {
  $(where).textContent = text;
  $(where).className = error ? "error" : "";
}

// Runs what a button does; what goes wrong is told.
async function told(work, where = "status") {
  try {
    await work();
    return true;
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true, where);
    return false;
  }
}

const kind = () => document.querySelector("[name=kind]:checked").value;

// --- asking

// The body of a request, and what to call its answer.
async function body(kindOf, text, session, turn) {
  if (kindOf === "prompt") return [{ prompt: text }, "Text"];
  if (kindOf === "messages") return [{ messages: [{ role: "user", content: text }] }, "Message"];
  return [{ prompt: await tokensOf(session, turn) }, `${session}, turn ${turn}`];
}

// Reads into a pane: what is held comes first. The timeline and the forgotten tokens follow, as the
// server has to compute the whole prompt for them, whatever it has cached.
async function read(pane, [asked, title], shown, readTokens) {
  const { signal } = reading;
  const answer = await request("/v1/lola/memory", asked, signal);
  const memory = new Memory(answer, title, config);
  shown(memory);
  if (!$("detail").checked) return;
  say("Reading the timeline and the forgotten tokens …");
  const detailed = await detail(answer.tokens, signal);
  if (!detailed) return;
  pane.show(new Memory(detailed, title, config), readTokens);
  if (pane === here) showHere();
  change({});
}

// Both, or one of them: of very long prompts the server tells less, and says why.
async function detail(tokens, signal) {
  let note = "";
  for (const wanted of [{ forgotten: true, history: true }, { history: true }, { forgotten: true }])
    try {
      const answer = await request("/v1/lola/memory", { prompt: tokens, ...wanted }, signal);
      say(note);
      return answer;
    } catch (error) {
      if (!/\b(forgotten|history)\b.*:/.test(error.message)) throw error;
      note ||= `A part is left out. ${error.message}`;
    }
  say(note);
  return null;
}

// `asks` has what is read; without it, the form has.
async function run(restored = {}, asks = null) {
  stop();
  if (!asks) {
    $("told").hidden = true;
    source = null;
  }
  reading = new AbortController();
  const { signal } = reading;
  say("Reading …");
  let shown = false;
  await told(async () => {
    const asked = await (asks?.() ??
      body(kind(), $("prompt").value, $("session").value, $("turn").value));
    await read(here, asked, (memory) => {
      shown = true;
      say("");
      show(memory, restored);
      restored.done?.();
    }, restored.read);
  });
  if (shown || signal.aborted) return;
  $("result").hidden = true;
  fold();
}

function stop() {
  for (const one of [asking, hearing, reading]) one?.abort();
}

function show(memory, restored) {
  $("layer").max = memory.answer.layers.length;
  $("head").max = memory.numHeads;
  $("least").max = memory.heads.length;
  const past = Math.max(20, memory.answer.window_start - memory.answer.sinks);
  $("top").max = past;
  $("result").hidden = false;
  $("intro").hidden = true;
  fold();
  for (const id of ["answer", "verdict", "kept"]) say("", false, id);
  $("before").hidden = kind() !== "session";
  here.show(memory);
  showHere();
  change({ ...DEFAULTS, top: Math.min(past, tenth(past)), ...restored.view });
}

function showHere() {
  heatmap.show(here.memory);
  for (const option of $("colour").options)
    if (option.value === "forgotten") option.disabled = !here.memory.hasForgotten;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (hearing) hush();
  else if (kind() === "library") question();
  else run();
});

$("ask").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  $("ask").requestSubmit();
});

$("key").addEventListener("input", () => useKey($("key").value));
$("key").addEventListener("change", start);

$("example").addEventListener("click", () => {
  fill(EXAMPLE);
  $("expected").value = EXAMPLE.expected;
  run({ done: answer });
});

function fill({ kind: kindOf = "prompt", prompt = "" }) {
  document.querySelector(`[name=kind][value=${kindOf}]`).checked = true;
  $("prompt").value = prompt;
  showKind();
}

function showKind() {
  const stored = kind() === "session", library = kind() === "library";
  $("stored").hidden = !stored;
  $("shelf").hidden = !library;
  $("library").disabled = !library; // else what it lacks would hold up the form
  $("prompt-name").textContent = library ? "Question" : "Prompt";
  if (!library) hush();
  $("run").textContent = hearing ? "Stop" : library ? "Ask the library" : "Show memory";
  $("typed").hidden = stored;
  $("prompt").required = !stored;
}

for (const radio of document.querySelectorAll("[name=kind]"))
  radio.addEventListener("change", () => {
    showKind();
    if (kind() === "session") told(openSessions);
    if (kind() === "library") told(openLibraries);
  });

async function openSessions() {
  const number = await listSessions($("session"));
  listTurns($("session").value, $("turn"));
  say(number ? "" : "The server has no stored sessions.");
}

$("session").addEventListener("change", () => listTurns($("session").value, $("turn")));

// --- a library

async function openLibraries() {
  const names = await libraries.listLibraries($("libraries"));
  if (names?.length && !$("library").value) $("library").value = names[0];
  say(names === null ? "This server does not list its libraries. Type the name of one; those that " +
      "were asked in this browser are offered."
    : names.length ? "" : "The server has no libraries. docs/library.md tells how to make one.");
}

// Asks a library what the form has. The sources; none if there is no answer.
async function question() {
  stop();
  const mine = hearing = new AbortController();
  source = null;
  $("intro").hidden = $("result").hidden = $("sources-title").hidden = true;
  $("told").hidden = false;
  for (const id of ["told-answer", "opened"]) say("", false, id);
  libraries.listSources($("sources"), []);
  fold();
  showKind();
  say("Asking …");
  let sources = [];
  const done = await told(async () => {
    const grow = (text) => say(text, false, "told-answer");
    sources = await libraries.ask($("library").value, $("prompt").value, grow,
      mine.signal);
    libraries.listSources($("sources"), sources, (one) => openSource(one));
    $("sources-title").hidden = !sources.length;
    say("");
  });
  if (hearing !== mine) return []; // a newer one has the page
  if (!done && !$("told-answer").textContent) $("told").hidden = true;
  hearing = null;
  showKind();
  return sources;
}

function hush() {
  if (!hearing) return;
  hearing.abort();
  say("Stopped.");
}

// Reads the part that a source is of, and chooses its sentence there.
async function openSource(one, restored) {
  source = one;
  say("", false, "opened");
  const done = () => {
    const span = libraries.spanOf(here.memory, one);
    say(span ? `${libraries.titleOf(one)}: its sentence is chosen in the text below.`
      : `${libraries.titleOf(one)}: its sentence does not stand in the text as it is told.`,
    false, "opened");
    change({ span });
    if (span) here.scrollTo(span);
  };
  await run(restored ?? { done }, async () =>
    [{ prompt: await tokensOf(one.session) }, libraries.titleOf(one)]);
}

// --- what is shown

follow(() => {
  if (!here.memory) return;
  const layers = here.memory.answer.layers.map(({ layer }) => layer);
  // 0 is all of them.
  $("layer").value = view.layer === null ? 0 : layers.indexOf(view.layer) + 1;
  $("head").value = view.head === null ? 0 : view.head + 1;
  $("layer-name").textContent = view.layer ?? "all";
  $("head-name").textContent = view.head ?? "all";
  $("least").value = view.least;
  $("least-name").textContent = `${view.least} ${view.least === 1 ? "head" : "heads"}`;
  $("top").value = view.top;
  $("top-name").textContent = words(view.top);
  $("colour").value = view.colour;
  $("scale").parentElement.dataset.colour = view.colour;
  $("clear").hidden = $("goto").hidden = !view.span;
  for (const pane of panes) pane.paint();
  heatmap.paint(here.read);
});

const number = (id) => Number($(id).value);
$("layer").addEventListener("input", () => change({
  layer: number("layer") ? here.memory.answer.layers[number("layer") - 1].layer : null,
}));
$("head").addEventListener("input", () =>
  change({ head: number("head") ? number("head") - 1 : null }));
$("least").addEventListener("input", () => change({ least: number("least") }));
$("top").addEventListener("input", () => change({ top: number("top") }));
$("colour").addEventListener("change", () => change({ colour: $("colour").value }));
$("clear").addEventListener("click", () => change({ span: null }));
$("goto").addEventListener("click", () => here.scrollTo(view.span));
for (const pane of panes) pane.moved = () => change({});

$("find").addEventListener("keydown", (event) => {
  if (event.key === "Enter") find(view.span ? here.memory.starts[view.span.first] + 1 : 0);
});
$("find").addEventListener("input", () => find(0));

function find(from) {
  const text = $("find").value;
  const span = here.memory.find(text, from) ?? here.memory.find(text);
  change({ span });
  if (span) here.scrollTo(span);
}

// The timeline stays below the controls, however tall these are.
new ResizeObserver(() => {
  const style = document.documentElement.style;
  style.setProperty("--controls", `${$("controls").offsetHeight}px`);
}).observe($("controls"));

// Where the page is narrow, sections are folded once there is something to see.
const narrow = matchMedia("(max-width: 899px)");

function fold() {
  for (const part of document.querySelectorAll(".fold")) {
    part.classList.toggle("narrow", narrow.matches);
    part.open = !narrow.matches || $("result").hidden;
  }
}

narrow.addEventListener("change", fold);

// --- the answer

async function answer() {
  if (asking) return asking.abort();
  asking = new AbortController();
  $("answer-run").textContent = "Stop";
  say("", false, "answer");
  say("", false, "verdict");
  const { memory } = here;
  await told(async () => {
    const grow = (text) => say(text, false, "answer");
    const text = await answers.ask(memory, number("max-tokens"), grow, asking.signal);
    const found = answers.judge(memory, text, $("expected").value);
    say(answers.verdict(memory, found), false, "verdict");
    if (found.span && here.memory.text === memory.text) {
      change({ span: found.span });
      here.bring(found.span);
    }
  }, "verdict");
  asking = null;
  $("answer-run").textContent = "Ask the model";
}

$("answer-run").addEventListener("click", answer);

// --- keeping and comparing

function beside(memory, readTokens) {
  there.show(memory, readTokens);
  $("alone").hidden = false;
  change({ colour: "change" });
}

$("keep").addEventListener("click", () => {
  const { memory } = here;
  beside(new Memory(memory.answer, `${memory.title}, kept`, memory.config), here.read);
});
$("alone").addEventListener("click", () => {
  there.close();
  $("alone").hidden = true;
  change({ colour: DEFAULTS.colour });
});
$("before").addEventListener("click", () => told(async () => {
  const turn = $("turn").options[$("turn").selectedIndex + 1]?.value;
  if (!turn) throw new Error("No turn before this one is kept.");
  await read(there, await body("session", "", $("session").value, turn), beside);
}, "kept"));
$("open").addEventListener("change", () => told(async () => {
  const [file] = $("open").files;
  if (!file) return;
  const { answer: found, title, config: theirs } = await readJson(file);
  $("open").value = "";
  beside(new Memory({ history_interval: null, rope_positions: null, ...found }, title, theirs));
}, "kept"));
$("save").addEventListener("click", () => saveJson({
  title: here.memory.title,
  lola_config: here.memory.config,
  memory: here.memory.answer,
  other: there.memory && {
    title: there.memory.title, lola_config: there.memory.config, memory: there.memory.answer,
  },
  answer: $("answer").textContent || null,
  verdict: $("verdict").textContent || null,
}, "lola-memory.json"));

$("link").addEventListener("click", () => told(async () => {
  const ask = { kind: kind(), prompt: $("prompt").value, session: $("session").value,
    turn: $("turn").value, library: $("library").value, source: source?.session,
    detail: $("detail").checked, expected: $("expected").value };
  if (ask.kind === "session") ask.prompt = "";
  const hash = await toLink({ ask, view: { ...view }, read: here.read });
  history.replaceState(null, "", hash);
  const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
  say(copied ? "The link is copied." : "The address of this page is now the link.", false, "kept");
}, "kept"));

async function restore() {
  const state = await fromLink(location.hash);
  if (!state) return;
  fill(state.ask);
  $("detail").checked = state.ask.detail;
  $("expected").value = state.ask.expected;
  if (state.ask.kind === "session") {
    await openSessions();
    $("session").value = state.ask.session;
    listTurns($("session").value, $("turn"));
    $("turn").value = state.ask.turn;
  }
  if (state.ask.kind !== "library") return run(state);
  $("library").value = state.ask.library;
  const sources = await question();
  const one = sources.find(({ session }) => session === state.ask.source);
  if (one) return openSource(one, state);
  if (sources.length) say("What the link shows is not among the sources now.", false, "opened");
}

// --- at the start

// Whether the server answers, before anything is typed: it may want a key.
async function probe() {
  if (!await told(async () => { config = (await request("/v1/lola/info")).lola_config; }))
    return false;
  if ($("status").className === "error") say("");
  $("key").placeholder = $("key").value ? "" : "none needed";
  return true;
}

// Once it answers, the view of the address is restored.
async function start() {
  if (!await probe()) return $("key").focus();
  if (kind() === "library" && $("result").hidden) await told(openLibraries);
  if (!here.memory) await told(restore);
}

addEventListener("hashchange", () => told(restore));
// The chat page keeps a key for its tab.
$("key").value = sessionStorage.getItem("lola-key") ?? "";
useKey($("key").value);
fold();
start();
