// A question to one of the server's libraries: the answer, and where it came from.

import { ServerError, events, request } from "./api.js";
import { words } from "./memory.js";
import { LIBRARIES, names, remember } from "./names.js";

const PATH = "/v1/lola/libraries";
const ANSWER_TOKENS = 256;

// Fills a list of names to choose from. The names, or null where the server does not list them: then
// those that were asked in this browser are in the list, and another can be typed all the same.
export async function listLibraries(list) {
  list.replaceChildren();
  let libraries;
  try {
    ({ libraries } = await request(PATH));
  } catch (error) {
    if (error.status !== 403) throw clear(error);
    list.replaceChildren(...names(LIBRARIES).map((name) => new Option("asked here before", name)));
    return null;
  }
  list.replaceChildren(...libraries.map(({ library, documents, tokens }) =>
    new Option(`${words(documents)} documents, ${words(tokens)} tokens`, library)));
  return libraries.map(({ library }) => library);
}

// Asks; calls `grow` with the answer so far. Its sources, what is read most first.
export async function ask(library, question, grow, signal) {
  const body = {
    messages: [{ role: "user", content: question }],
    max_tokens: ANSWER_TOKENS,
    temperature: 0,
    stream: true,
  };
  let text = "", sources = [];
  try {
    for await (const event of events(`${PATH}/${library}/chat`, body, signal)) {
      sources = event.sources ?? sources;
      text += event.choices?.[0]?.delta?.content ?? "";
      grow(text);
    }
  } catch (error) {
    throw clear(error);
  }
  remember(LIBRARIES, library);
  return sources;
}

// A route that is not there says only that.
function clear(error) {
  if (error.status !== 404 || error.message !== "Not Found") return error;
  return new ServerError(`This server has no libraries: it does not know ${PATH}.`, 404);
}

export const titleOf = ({ document: name, part, parts }) =>
  parts > 1 ? `${name}, part ${part} of ${parts}` : name;

// Shows sources; `open` is called with the one whose text is to be shown.
export function listSources(list, sources, open) {
  list.replaceChildren(...sources.map((source) => {
    const item = document.createElement("li");
    const add = (tag, text) => {
      const element = document.createElement(tag);
      element.textContent = text;
      item.append(element);
      return element;
    };
    add("strong", titleOf(source));
    const share = `${Math.round(source.share * 100)} % of what was found, score `;
    add("div", share + source.score.toPrecision(3));
    if (source.sentence) add("blockquote", source.sentence);
    const button = add("button", "Show it in its text");
    button.type = "button";
    button.setAttribute("aria-label", `Show it in its text: ${titleOf(source)}`);
    button.addEventListener("click", () => open(source));
    return item;
  }));
}

// Where the sentence of a source stands in a reading of its part, null if nowhere. It is told on one
// line.
export function spanOf(memory, { sentence }) {
  const parts = sentence.split(/\s+/).filter(Boolean);
  if (!parts.length) return null;
  const escaped = parts.map((part) => part.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
  const found = memory.text.match(new RegExp(escaped.join("\\s+")));
  return found && memory.tokensOf(found.index, found.index + found[0].length);
}
