// Puts the parts of the chat page together: which session, what is said, and what is held of it.

import { request, useKey } from "../inspector/api.js";
import { toLink } from "../inspector/link.js";
import { words } from "../inspector/memory.js";
import { render } from "./blocks.js";
import { Holds, bytes } from "./holds.js";
import { forget, fresh, names, remember } from "./names.js";
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
let stopped = null; // where it was before a turn that was stopped and is not stored yet
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
  made.setAttribute("aria-label", { user: "You", assistant: "The model" }[role] ?? "Said before");
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

const chosen = () => decodeURIComponent(location.hash.slice(1));

// Shows the session of a name, from what the server has of it. Nobody has a new one's name.
async function open(wanted, isNew = false) {
  opening.abort();
  opening = new AbortController();
  const { signal } = opening;
  [name, at, turns, stopped] = [wanted, { turn: 0, tokens: null }, [], null];
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
      remember(name);
      const { said, cut } = await session.messages(name);
      if (signal.aborted) return;
      showSaid(said, cut);
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

function showSaid(said, cut) {
  $("log").replaceChildren();
  if (cut) note(`${words(cut)} earlier tokens are not shown. The memory has read them.`);
  for (const { role, text } of said)
    if (text.trim()) bubble(role, text);
  if (said.at(-1)?.role === "assistant" && !said.at(-1).text.trim())
    note("This answer was stopped; its text is not part of the memory.");
  $("log").scrollTop = $("log").scrollHeight;
}

function showNames() {
  const known = names();
  const options = known.map((other) => new Option(other, other));
  if (!known.includes(name)) options.unshift(new Option(`${name} (new)`, name));
  $("chats").replaceChildren(...options);
  $("chats").value = name;
  $("name").value = name;
  $("delete").hidden = !at.turn;
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
      remember(to, old);
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
    forget(name);
    await openFirst(names()[0]);
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

async function turn(text) {
  asking = new AbortController();
  busy(true);
  say("");
  $("welcome")?.remove();
  const mine = bubble("user", text);
  const theirs = bubble("assistant");
  $("log").scrollTop = $("log").scrollHeight;
  $("message").value = "";
  const before = at, began = performance.now(), recalls = $("recall").checked;
  let first = null, came = null, frame = 0;
  const draw = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    if (came) atEnd(() => theirs.replaceChildren(...answered(came)));
    // A segment that comes back is counted in them until the answer has ended.
    if (came?.tokens && !recalls) holds?.show(came.tokens, turns);
  };
  try {
    if (stopped) await followStopped(0);
    const most = Number($("max-tokens").value);
    const fields = { max_tokens: most };
    if ($("temperature").value) fields.temperature = Number($("temperature").value);
    if (recalls) fields.recall = "segments";
    const { told, ended, usage } = await session.say(name, at, text, fields, (now) => {
      came = now;
      if (now.words || now.reasoning) first ??= performance.now() - began;
      frame ||= requestAnimationFrame(draw);
    }, asking.signal);
    draw();
    atEnd(() => finish(told, ended, usage, most, first));
  } catch (error) {
    draw();
    if (error.name === "AbortError") await stop(before);
    else {
      tell(error);
      if (came?.words) note("The answer broke off. Reload the page to go on from what is stored.");
      else {
        // Nothing was answered: the message may be corrected and sent again.
        mine.remove();
        theirs.remove();
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
function finish(told, ended, usage, most, first) {
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
  const why = told.reason && at.turn ? ` (${told.reason})` : "";
  note(`turn ${told.turn}: ${words(restored)} tokens restored${why}, ` +
    `${words(prompt - restored)} read, first word after ` +
    `${((first ?? 0) / 1000).toFixed(2)} s, ${bytes(told.bytes)} stored`);
  at = { turn: told.turn, tokens: told.tokens };
  turns.push({ tokens: told.tokens, bytes: told.bytes });
  remember(name);
}

// Where the server has read the message, it has the state at the end of the prompt, and none of an
// answer that it was still making.
async function stop(before) {
  stopped = before;
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
  remember(name);
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
  await openFirst(chosen() || names()[0]);
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
