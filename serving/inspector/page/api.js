// Requests to the server that the page came from. The key is sent, and is not kept here.

// A proxy may have put something before the route.
export const server = location.href.split(/[?#]/)[0].replace(/\/(lola\/inspector\/?)?$/, "");

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let key = "";

export function useKey(value) {
  key = value.trim();
}

export async function request(path, body, signal, method) {
  const response = await send(path, body, signal, method);
  return response.json();
}

// The JSON values of a stream of server-sent events.
export async function* events(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError("The answer broke off before its end. Does the server run?", 0);
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (!data) continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message ?? String(event.error));
      yield event;
    }
  }
}

async function send(path, body, signal, method = body ? "POST" : "GET") {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(server + path, {
    method,
    headers,
    body: body && JSON.stringify(body),
    signal,
  }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`No answer from ${server}: ${error.message}`, 0);
  });
  if (!response.ok) throw new ServerError(await reason(response), response.status);
  return response;
}

async function reason(response) {
  if (response.status === 401)
    return key
      ? "The server does not know this API key. Correct it and try again."
      : "The server wants an API key. Type it into the field “API key”.";
  const answer = await response.json().catch(() => ({}));
  return String(answer.error?.message ?? answer.error ?? answer.detail ?? response.statusText);
}
