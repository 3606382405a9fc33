// The server's stored sessions and their turns. The tokens of a turn are read as a prompt: the same
// tokens give the same memory.

import { request } from "./api.js";
import { CHATS, names } from "./names.js";

let sessions = [];

export async function listSessions(select) {
  try {
    ({ sessions } = await request("/v1/lola/sessions"));
  } catch (error) {
    if (error.status !== 403) throw error;
    const own = names(CHATS).map((name) => request(`/v1/lola/sessions/${name}`).catch(() => null));
    sessions = (await Promise.all(own)).filter(Boolean); // this browser's chats, where none are listed
    if (!sessions.length) throw error;
  }
  const chosen = select.value;
  select.replaceChildren(...sessions.map(({ session, turn, tokens }) =>
    new Option(`${session} (turn ${turn}, ${tokens} tokens)`, session)));
  if (sessions.some(({ session }) => session === chosen)) select.value = chosen;
  return sessions.length;
}

// Turns of a session that are kept; newest first.
export function listTurns(session, select) {
  const turns = [...(sessions.find((s) => s.session === session)?.turns ?? [])].reverse();
  select.replaceChildren(...turns.map((turn) => new Option(`turn ${turn}`, turn)));
}

export async function tokensOf(session, turn) {
  if (!session) throw new Error("The server has no stored sessions.");
  const name = turn ? `${session}@${turn}` : session;
  const { tokens } = await request(`/v1/lola/sessions/${name}/tokens`);
  return tokens;
}
