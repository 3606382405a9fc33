// Names that this browser has used, the last used first: of chats and of libraries. A server without
// API keys lists neither. What they hold is on the server.

export const CHATS = "lola-chats", LIBRARIES = "lola-libraries";
const MOST = 100;

export function names(kind) {
  try {
    const found = JSON.parse(localStorage.getItem(kind));
    return Array.isArray(found) ? found.filter((name) => typeof name === "string") : [];
  } catch {
    return [];
  }
}

export function remember(kind, name, instead = name) {
  const others = names(kind).filter((other) => other !== name && other !== instead);
  localStorage.setItem(kind, JSON.stringify([name, ...others].slice(0, MOST)));
}

export function forget(kind, name) {
  localStorage.setItem(kind, JSON.stringify(names(kind).filter((other) => other !== name)));
}
