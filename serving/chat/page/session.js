// A stored session on the server: where it is, what was said in it, and its next turn.

import { events, request } from "../inspector/api.js";

// vLLM ends an answer whose last tokens are 32 to 128 tokens four times over.
const REPETITION = { min_pattern_size: 32, max_pattern_size: 128, min_count: 4 };
// How long the state at the end of a prompt is waited for after an answer was stopped.
const SETTLE_MS = 2000;
// Tokens of the end of a session that are shown.
const SHOWN = 16384;

const path = (name, end = "") => `/v1/lola/sessions/${encodeURIComponent(name)}${end}`;

// The session of this name, null where there is none.
export async function find(name, signal) {
  try {
    return await request(path(name), null, signal);
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

export const rename = (name, to) => request(path(name), { session: to }, undefined, "PATCH");
export const remove = (name) => request(path(name), null, undefined, "DELETE");

// Whether a turn begins a chat with what it reads of a library, which is a turn of its own.
export const composes = (from, { library }) => !from.turn && library;

// A turn after `from`, { turn, tokens }, which is the last one or one before it. `fields` are those
// of a chat completion, with its messages and the `library` that is asked. `grow` is called with
// { words, reasoning, tokens } as they come. The result is { told, ended, usage, sources }; `told` is
// what the store says.
export async function say(name, last, from, fields, grow, signal) {
  const begins = composes(from, fields);
  const { library, ...others } = fields;
  const where = begins ? `/v1/lola/libraries/${encodeURIComponent(library)}/chat`
    : path(from.turn < last.turn ? `${name}@${from.turn}` : name, "/chat");
  // So that nobody else's turn, and no lost one, is gone on from unnoticed.
  const place = begins ? { session: name } : { turn: from.turn, tokens: from.tokens };
  const body = {
    ...place,
    ...(begins ? others : fields),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    repetition_detection: REPETITION,
  };
  let told = {}, ended = null, usage = {}, sources = [], words = "", reasoning = "";
  for await (const event of events(where, body, signal)) {
    for (const { delta, finish_reason } of event.choices ?? []) {
      words += delta.content ?? "";
      reasoning += delta.reasoning ?? "";
      ended = finish_reason ?? ended;
    }
    usage = event.usage ?? usage;
    sources = event.sources ?? sources;
    told = event.kv_transfer_params?.lola ?? told;
    grow({ words, reasoning, tokens: usage.total_tokens });
  }
  return { told, ended, usage, sources };
}

// The turn of this number, whose answer was stopped, null while it is not stored. Another turn is not
// taken: the server refuses to go on from there, and says why.
export async function followed(name, turn, wait = SETTLE_MS) {
  const deadline = Date.now() + wait;
  for (;;) {
    const found = await find(name);
    if (found?.turn === turn) return found;
    if (Date.now() >= deadline) return null;
    await new Promise((done) => setTimeout(done, 100));
  }
}

// Where a session was before its last turn, { turn, tokens }; null where that is not kept.
export function before({ turn, states }) {
  const ids = new Map(states.map((state) => [state.id, state]));
  let state = states.at(-1);
  while (state?.turn === turn) state = ids.get(state.parent);
  return state ? { turn: state.turn, tokens: state.tokens } : null;
}

// --- what was said

const PROBE = "Zq7wlola1";
let marks = null; // what the chat template writes between messages

// The marks, from what the template writes around probes, as tokens give it back.
async function findMarks() {
  const [start, toAnswer, toUser] = await written("user", "assistant", "user");
  if (!toAnswer || !toUser || toAnswer === toUser) return null;
  // A template may know no system prompt.
  const [system, toFirst] = await written("system", "user").catch(() => []);
  return { start, toAnswer, toUser, system, toFirst };
}

// What the template writes before each message of these roles.
async function written(...roles) {
  const messages = roles.map((role) => ({ role, content: PROBE }));
  const { tokens } = await request("/tokenize", { messages, add_generation_prompt: false });
  return (await textOf(tokens)).split(PROBE);
}

const textOf = async (tokens) => (await request("/detokenize", { tokens })).prompt;

// The messages of a session, [{ role, text }], from its tokens: the server keeps no others. The role
// is "system", "user", "assistant", or "" where the text cannot be divided.
export async function messages(name) {
  const { tokens } = await request(path(name, "/tokens"));
  const tail = tokens.slice(-SHOWN);
  const text = await textOf(tail);
  marks ??= await findMarks().catch(() => null);
  return { cut: tokens.length - tail.length, said: divide(text, marks) };
}

export function divide(text, found) {
  if (!found) return [{ role: "", text }];
  const { start, toAnswer, toUser, system, toFirst } = found;
  const said = [];
  let rest = text, role = "";
  // A template may write a system prompt of its own, which nobody said: then `start` has all of it.
  const own = text.startsWith(start);
  const first = toFirst ? text.indexOf(toFirst) : -1;
  if (text.startsWith(system ?? start) && first >= 0 && !(own && start.length > system.length)) {
    said.push({ role: "system", text: text.slice(system.length, first) });
    [rest, role] = [text.slice(first + toFirst.length), "user"];
  } else if (own) [rest, role] = [text.slice(start.length), "user"];
  for (;;) {
    const [answer, user] = [toAnswer, toUser].map((mark) => {
      const at = rest.indexOf(mark);
      return at < 0 ? Infinity : at;
    });
    const at = Math.min(answer, user);
    if (at === Infinity) break;
    const next = answer < user ? "assistant" : "user";
    // What stands before the first mark is told by the mark.
    said.push({ role: role || (next === "user" ? "assistant" : "user"), text: rest.slice(0, at) });
    rest = rest.slice(at + (answer < user ? toAnswer : toUser).length);
    role = next;
  }
  // The beginning of a mark ends the last message.
  for (let length = Math.min(toUser.length, rest.length); length > 0; length--)
    if (rest.endsWith(toUser.slice(0, length))) {
      rest = rest.slice(0, -length);
      break;
    }
  return [...said, { role, text: rest.replace(/<\|[a-z_]+\|>$/, "") }];
}
