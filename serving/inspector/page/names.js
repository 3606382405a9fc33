// This browser's own chats: names of sessions, the last used first. Their text is on the server.

const KEY = "lola-chats";
const MOST = 100;

export function names() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY));
    return Array.isArray(found) ? found.filter((name) => typeof name === "string") : [];
  } catch {
    return [];
  }
}

export function remember(name, instead = name) {
  const others = names().filter((other) => other !== name && other !== instead);
  localStorage.setItem(KEY, JSON.stringify([name, ...others].slice(0, MOST)));
}

export function forget(name) {
  localStorage.setItem(KEY, JSON.stringify(names().filter((other) => other !== name)));
}

export function fresh() {
  const bytes = crypto.getRandomValues(new Uint8Array(4));
  return `chat-${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}
