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

// A turn after `at`, { turn, tokens }, with `fields` of a chat completion. `grow` is called with { words, reasoning, tokens } as they
// come. The result is { told, ended, usage }; `told` is what the store says.
export async function say(name, at, text, fields, grow, signal) {
  const body = {
    messages: [{ role: "user", content: text }],
    turn: at.turn, // so that nobody else's turn, and no lost one, is gone on from unnoticed
    tokens: at.tokens,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    repetition_detection: REPETITION,
    ...fields,
  };
  let told = {}, ended = null, usage = {}, words = "", reasoning = "";
  for await (const event of events(path(name, "/chat"), body, signal)) {
    for (const { delta, finish_reason } of event.choices ?? []) {
      words += delta.content ?? "";
      reasoning += delta.reasoning ?? "";
      ended = finish_reason ?? ended;
    }
    usage = event.usage ?? usage;
    told = event.kv_transfer_params?.lola ?? told;
    grow({ words, reasoning, tokens: usage.total_tokens });
  }
  return { told, ended, usage };
}

// The turn after one whose answer was stopped, null while it is not stored. Another turn is not
// taken: the server refuses to go on from there, and says why.
export async function followed(name, before, wait = SETTLE_MS) {
  const deadline = Date.now() + wait;
  for (;;) {
    const found = await find(name);
    if (found?.turn === before.turn + 1) return found;
    if (Date.now() >= deadline) return null;
    await new Promise((done) => setTimeout(done, 100));
  }
}

// --- what was said

let marks = null; // what the chat template writes between messages

// A probe's text as the template writes it, and as tokens give it back.
async function findMarks() {
  const [one, two, three] = ["Zq7wlola1", "Zq7wlola2", "Zq7wlola3"];
  const messages = [one, two, three].map((content, i) =>
    ({ role: i === 1 ? "assistant" : "user", content }));
  const { tokens } = await request("/tokenize", { messages, add_generation_prompt: false });
  const text = await textOf(tokens);
  const [before, toAnswer, toUser] = text.split(/Zq7wlola[123]/);
  if (!toAnswer || !toUser || toAnswer === toUser) return null;
  return { before, toAnswer, toUser };
}

const textOf = async (tokens) => (await request("/detokenize", { tokens })).prompt;

// The messages of a session, [{ role, text }], from its tokens: the server keeps no others. The role
// is "user", "assistant", or "" where the text cannot be divided.
export async function messages(name) {
  const { tokens } = await request(path(name, "/tokens"));
  const tail = tokens.slice(-SHOWN);
  const text = await textOf(tail);
  marks ??= await findMarks().catch(() => null);
  return { cut: tokens.length - tail.length, said: divide(text, marks) };
}

export function divide(text, found) {
  if (!found) return [{ role: "", text }];
  const { before, toAnswer, toUser } = found;
  let rest = text.startsWith(before) ? text.slice(before.length) : text;
  const said = [];
  let role = "";
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
