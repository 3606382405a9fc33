// Puts the parts of the chat page together: which session, what is said, and what is held of it.

import { request, useKey } from "../inspector/api.js";
import { listLibraries, titleOf } from "../inspector/library.js";
import { toLink } from "../inspector/link.js";
import { words } from "../inspector/memory.js";
import { CHATS, LIBRARIES, forget, names, remember } from "../inspector/names.js";
import { render } from "./blocks.js";
import { Holds, bytes } from "./holds.js";
import * as session from "./session.js";

const $ = (id) => document.getElementById(id);
const KEY = "lola-key"; // in this tab's storage, so that a reload asks for no key
const CUT = { // why an answer has ended, where it has not come to its end
  length: (tokens, most) => tokens < most
    ? `Cut at ${words(tokens)} tokens: the server's --max-model-len is used up.`
    : `Cut at ${words(tokens)} tokens. Say “go on”, or allow more tokens an answer.`,
  repetition: (tokens) => `Ended at ${words(tokens)} tokens: the answer repeats itself.`,
};

let holds = null; // null until the server has told its sizes
let name = "";
let at = { turn: 0, tokens: null }; // the session's last turn, and the tokens that it covers
let turns = []; // { tokens, bytes } of its states
let stopped = null; // the number of a turn that was stopped and is not stored yet
let editing = null; // what is to be replaced: { mine, from }, a message and where it went on from
let asking = null; // what stops the answer that is coming
let opening = new AbortController(); // and the opening of a session: a newer one takes its place

function say(text, error = false) {
  $("status").textContent = text;
  $("status").className = error ? "error" : "";
}

// What goes wrong is told, in the server's words.
function tell(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) {
    $("key-row").hidden = false;
    $("key").focus();
  }
  say(error.message, true);
}

// --- the log

function bubble(role, text = "") {
  const made = document.createElement("article");
  made.className = role || "past";
  const who = { system: "System prompt", user: "You", assistant: "The model" };
  made.setAttribute("aria-label", who[role] ?? "Said before");
  made.append(render(text));
  $("log").append(made);
  return made;
}

function note(text, kind = "") {
  const made = document.createElement("p");
  made.className = `note ${kind}`;
  made.textContent = text;
  $("log").append(made);
}

// What can be done with a message and its answer. `from` is where they went on from.
function offer(mine, text, from) {
  const made = document.createElement("div");
  made.className = "actions";
  const add = (label, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.setAttribute("aria-label", `${label}: ${text.slice(0, 60)}`);
    button.addEventListener("click", () => asking || act());
    made.append(button);
  };
  add("Edit", () => {
    edit({ mine, from });
    $("message").value = text;
    $("message").focus();
  });
  add("Regenerate", () => {
    edit({ mine, from });
    turn(text);
  });
  $("log").append(made);
}

function edit(what) {
  editing = what;
  $("editing").hidden = !what;
  showSystem();
}

// The system prompt can be changed where a chat begins, and again with its first message.
function showSystem() {
  $("system").readOnly = Boolean(editing ? editing.from.turn : at.turn);
}

// Changes the log, and keeps its end in view where it was.
function atEnd(change) {
  const log = $("log");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const result = change();
  if (follows) log.scrollTop = log.scrollHeight;
  return result;
}

function welcome() {
  const [first, second] = ["p", "p"].map((kind) => document.createElement(kind));
  first.textContent = "Write a message below. The server keeps this chat as a session whose memory " +
    "has one size, however long the chat becomes; only what is new is sent and read.";
  second.textContent = "“Memory” shows what the model holds of the chat, and what a full KV cache " +
    "would hold.";
  const made = document.createElement("div");
  made.id = "welcome";
  made.append(first, second);
  $("log").replaceChildren(made);
}

// --- which session

function fresh() {
  const random = crypto.getRandomValues(new Uint8Array(4));
  return `chat-${[...random].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

const chosen = () => decodeURIComponent(location.hash.slice(1));

// Shows the session of a name, from what the server has of it. Nobody has a new one's name.
async function open(wanted, isNew = false) {
  opening.abort();
  opening = new AbortController();
  const { signal } = opening;
  [name, at, turns, stopped] = [wanted, { turn: 0, tokens: null }, [], null];
  for (const id of ["system", "library"]) $(id).value = "";
  edit(null);
  history.replaceState(null, "", `#${encodeURIComponent(name)}`);
  welcome();
  showNames();
  say("");
  try {
    const found = isNew ? null : await session.find(name, signal);
    if (signal.aborted) return;
    if (found) {
      say("Reading what was said …");
      place(found);
      remember(CHATS, name);
      const { said, cut } = await session.messages(name);
      if (signal.aborted) return;
      showSaid(said, cut, session.before(found));
      say("");
    }
    showNames();
    showMemory();
  } catch (error) {
    if (!signal.aborted) tell(error);
  }
}

// Also of a new chat the server is asked: one that stores nothing says so before a message is sent.
const openFirst = (known) => open(known ?? fresh());

// Of a turn with two states, at the end of the prompt and of the answer, the last counts.
function place(found) {
  at = { turn: found.turn, tokens: found.tokens };
  const last = new Map(found.states.map((state) => [state.turn, state]));
  turns = [...last.values()].map(({ tokens, bytes: size }) => ({ tokens, bytes: size }));
}

// `from` is where the last message went on from, null where that is not known.
function showSaid(said, cut, from) {
  $("log").replaceChildren();
  if (cut) note(`${words(cut)} earlier tokens are not shown. The memory has read them.`);
  let last = null;
  for (const { role, text } of said) {
    const made = text.trim() ? bubble(role, text) : null;
    if (made && role === "system") $("system").value = text;
    if (made && role === "user") last = { made, text };
  }
  if (said.at(-1)?.role === "assistant" && !said.at(-1).text.trim())
    note("This answer was stopped; its text is not part of the memory.");
  const alone = !cut && said.filter(({ role }) => role === "user").length === 1;
  const before = from ?? (alone && { turn: 0, tokens: null });
  if (last && before) offer(last.made, last.text, before);
  $("log").scrollTop = $("log").scrollHeight;
}

function showNames() {
  const known = names(CHATS);
  const options = known.map((other) => new Option(other, other));
  if (!known.includes(name)) options.unshift(new Option(`${name} (new)`, name));
  $("chats").replaceChildren(...options);
  $("chats").value = name;
  $("name").value = name;
  $("delete").hidden = !at.turn;
  showSystem();
}

function showMemory(tokens = at.tokens ?? 0) {
  holds?.show(tokens, turns);
  link();
}

// The inspector, with the last turn in it where there is one.
async function link() {
  const { turn } = at, ask = { kind: "session", prompt: "", session: name, turn, detail: true,
    expected: "" };
  const view = turn ? await toLink({ ask, view: {} }) : "";
  if (at.turn === turn && ask.session === name) $("inspect").href = `lola/inspector${view}`;
}

$("new").addEventListener("click", () => {
  open(fresh(), true);
  $("message").focus();
});
$("chats").addEventListener("change", () => open($("chats").value));
addEventListener("hashchange", () => {
  if (!asking && chosen() && chosen() !== name) open(chosen());
});

$("name").addEventListener("change", async () => {
  const to = $("name").value.trim(), old = name;
  if (!to || to === old) return showNames();
  try {
    if (at.turn) {
      await session.rename(old, to);
      remember(CHATS, to, old);
      name = to;
      history.replaceState(null, "", `#${encodeURIComponent(name)}`);
      say("");
      showMemory();
    } else await open(to); // a chat of this name is gone on with, if there is one
  } catch (error) {
    tell(error);
  }
  showNames();
});

$("delete").addEventListener("click", async () => {
  if (!confirm(`Delete ${name}? The server forgets all that was said in it.`)) return;
  try {
    await session.remove(name);
    forget(CHATS, name);
    await openFirst(names(CHATS)[0]);
  } catch (error) {
    tell(error);
  }
});

// --- a turn

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  for (const id of ["new", "chats", "name", "delete"]) $(id).disabled = is;
}

// What a message sends: a system prompt where it begins a chat, and where it asks.
function fieldsOf(text, from) {
  const begins = !from.turn && $("system").value.trim();
  const system = begins ? [{ role: "system", content: $("system").value }] : [];
  const fields = { messages: [...system, { role: "user", content: text }] };
  fields.max_tokens = Number($("max-tokens").value);
  if ($("temperature").value) fields.temperature = Number($("temperature").value);
  if ($("library").value) fields.library = $("library").value;
  else if ($("recall").checked) fields.recall = "segments";
  return fields;
}

// Sends a message: the next one, or in the place of the one that is replaced.
async function turn(text) {
  asking = new AbortController();
  busy(true);
  say("");
  await (stopped && followStopped(0).catch(tell));
  const replaced = editing, from = replaced?.from ?? at;
  $("welcome")?.remove();
  if (replaced) {
    while (replaced.mine.nextSibling) replaced.mine.nextSibling.remove();
    if (!from.turn) $("log").replaceChildren();
    replaced.mine.remove();
  }
  const fields = fieldsOf(text, from);
  edit(null);
  const system = fields.messages.slice(0, -1).map(({ role, content }) => bubble(role, content));
  const mine = bubble("user", text);
  const theirs = bubble("assistant");
  $("log").scrollTop = $("log").scrollHeight;
  $("message").value = "";
  const began = performance.now(), most = fields.max_tokens;
  const adds = fields.recall || fields.library; // text that comes back, and is counted in the tokens
  let first = null, came = null, frame = 0;
  const draw = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    if (came) atEnd(() => theirs.replaceChildren(...answered(came)));
    if (came?.tokens && !adds) holds?.show(came.tokens, turns);
  };
  try {
    if (!from.turn && at.turn) { // nothing is before the message: the chat begins anew
      await session.remove(name);
      [at, turns] = [from, []];
    }
    const answer = await session.say(name, at, from, fields, (now) => {
      came = now;
      if (now.words || now.reasoning) first ??= performance.now() - began;
      frame ||= requestAnimationFrame(draw);
    }, asking.signal);
    draw();
    atEnd(() => {
      finish(answer, most, first, from);
      offer(mine, text, from);
    });
    if (fields.library) remember(LIBRARIES, fields.library);
  } catch (error) {
    draw();
    if (error.name === "AbortError") {
      await stop(at.turn + (session.composes(from, fields) ? 2 : 1));
      offer(mine, text, from);
    } else if (replaced && !came?.words) {
      await open(name); // what was to be replaced
      $("message").value ||= text;
      tell(error);
    } else {
      tell(error);
      if (came?.words) note("The answer broke off. Reload the page to go on from what is stored.");
      else {
        // Nothing was answered: the message may be corrected and sent again.
        for (const made of [...system, mine, theirs]) made.remove();
        $("message").value ||= text;
        if (!$("log").children.length) welcome();
      }
    }
  }
  asking = null;
  busy(false);
  showNames();
  showMemory();
  $("message").focus({ preventScroll: true });
}

function answered({ words: text, reasoning }) {
  if (!reasoning) return [render(text)];
  const thought = document.createElement("div");
  thought.className = "reasoning";
  thought.append(render(reasoning));
  return [thought, render(text)];
}

// Takes the place of a turn that is stored, and says what there is to say about it.
function finish({ told, ended, usage, sources }, most, first, from) {
  const tokens = usage.completion_tokens ?? 0;
  if (CUT[ended]) note(CUT[ended](tokens, most), "cut");
  if (!told.turn) {
    say(`The turn is not stored: ${told.unsaved ?? "the server says nothing of it"}. Reload the ` +
      "page to go on from what is stored.", true);
    return;
  }
  if (told.unsaved)
    note(`The answer's text is not part of the memory: ${told.unsaved}`, "unsaved");
  if (told.unwritten)
    note(`The turn is in the server's memory only: ${told.unwritten}`, "unsaved");
  const restored = told.restored_tokens ?? 0;
  let prompt = usage.prompt_tokens ?? 0;
  if (told.recalled) {
    const { first: from, last: end, sentence } = told.recalled;
    prompt -= end - from; // which is no part of the chat
    note(`recalled tokens ${words(from)} to ${words(end - 1)}: ${sentence}`);
  }
  for (const [index, one] of sources.entries())
    note(`[${index + 1}] ${titleOf(one)} (${Math.round(one.share * 100)} %)` +
      (one.sentence ? `: ${one.sentence}` : ""));
  if (sources.length && from.turn) prompt -= sources[0].tokens; // nor is what was found
  const why = told.reason && at.turn ? ` (${told.reason})` : "";
  note(`turn ${told.turn}: ${words(restored)} tokens restored${why}, ` +
    `${words(prompt - restored)} read, first word after ` +
    `${((first ?? 0) / 1000).toFixed(2)} s, ${bytes(told.bytes)} stored`);
  at = { turn: told.turn, tokens: told.tokens };
  turns.push({ tokens: told.tokens, bytes: told.bytes });
  remember(CHATS, name);
}

// Where the server has read the message, it has the state at the end of the prompt, and none of an
// answer that it was still making.
async function stop(number) {
  stopped = number;
  say("Stopping …");
  try {
    const kind = await followStopped();
    say("");
    if (kind === null) note("Stopped. Neither your message nor the answer is part of the memory.");
    else if (kind === "answer") note("Stopped. All of the answer is part of the memory.");
    else note("Stopped. Your message is part of the memory, the answer's text is not.");
  } catch (error) {
    tell(error);
  }
}

async function followStopped(wait) {
  const found = await session.followed(name, stopped, wait);
  if (!found) {
    if (wait === 0) stopped = null; // the server has not read that message
    return null;
  }
  stopped = null;
  place(found);
  remember(CHATS, name);
  return found.states.at(-1).kind;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("message").value;
  if (!asking && text.trim()) turn(text);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => asking?.abort());
$("cancel").addEventListener("click", () => edit(null));

// --- at the start

async function start() {
  try {
    const info = await request("/v1/lola/info");
    holds = new Holds(info);
    $("model").textContent = info.model;
  } catch (error) {
    tell(error);
    return;
  }
  // A server without libraries, or without a store, has none to offer.
  listLibraries($("libraries")).catch(() => {});
  await openFirst(chosen() || names(CHATS)[0]);
  $("message").focus({ preventScroll: true });
}

$("key").addEventListener("change", () => {
  const key = $("key").value.trim();
  useKey(key);
  sessionStorage.setItem(KEY, key);
  start();
});

const key = sessionStorage.getItem(KEY) ?? "";
useKey(key);
$("key").value = key;
$("key-row").hidden = !key;
// On a phone the memory is a line, which opens.
if (matchMedia("(max-width: 899px)").matches) $("memory").open = false;
welcome();
start();
