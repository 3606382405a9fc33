// A view as the end of the page's address, and as a file. Neither has the key.

const MARK = "#view=";

export async function toLink(state) {
  const bytes = await piped(new TextEncoder().encode(JSON.stringify(state)),
    new CompressionStream("deflate-raw"));
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  const safe = btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
  return MARK + safe;
}

// The state of an address; null where it has none.
export async function fromLink(hash) {
  if (!hash.startsWith(MARK)) return null;
  try {
    const text = atob(hash.slice(MARK.length).replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = await piped(Uint8Array.from(text, (c) => c.charCodeAt(0)),
      new DecompressionStream("deflate-raw"));
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    throw new Error("The address ends in a view that cannot be read: a part of it is missing.");
  }
}

async function piped(bytes, stream) {
  const answer = new Response(new Blob([bytes]).stream().pipeThrough(stream));
  return new Uint8Array(await answer.arrayBuffer());
}

export function saveJson(value, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(value)], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// The answer of /v1/lola/memory in a file that `saveJson` made, or in one with the answer alone; then
// the server's settings are null.
export async function readJson(file) {
  const value = await file.text().then(JSON.parse).catch(() => null);
  const answer = value?.memory ?? value;
  if (!Array.isArray(answer?.layers) || !Array.isArray(answer?.tokens))
    throw new Error(`${file.name} is no saved reading: save one with “Save as JSON”.`);
  const title = value.title ? `${value.title}, ${file.name}` : file.name;
  return { answer, title, config: value.lola_config ?? null };
}
