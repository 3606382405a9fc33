// The model's answer, as it comes, and whether it says what was to be recalled.

import { events } from "./api.js";

// Goes on with the tokens of a reading; calls `grow` with the text so far.
export async function ask(memory, maxTokens, grow, signal) {
  let text = "";
  const body = {
    model: memory.answer.model,
    prompt: memory.answer.tokens,
    max_tokens: maxTokens,
    temperature: 0,
    repetition_penalty: 1, // the model's own would tell on what is recalled
    stream: true,
  };
  for await (const event of events("/v1/completions", body, signal)) {
    text += event.choices?.[0]?.text ?? "";
    grow(text);
  }
  return text;
}

// What the answer took from the text: { wanted, said, span }. `span` is where it stands in front of
// the window, null if it does not.
export function judge(memory, answer, expected) {
  const wanted = expected.trim();
  if (wanted) {
    const plain = (text) => text.replace(/\s+/g, " ").toLowerCase();
    return {
      wanted,
      said: plain(answer).includes(plain(wanted)),
      span: memory.findPast(wanted),
    };
  }
  // Without an expectation: the most telling word of the answer that stands in the text, numbers
  // first and then the longest.
  const found = [...new Set(answer.match(/[\p{L}\p{N}][\p{L}\p{N}.,:/-]*[\p{L}\p{N}]/gu) ?? [])]
    .filter((word) => word.length > 3)
    .sort((a, b) => /\p{N}/u.test(b) - /\p{N}/u.test(a) || b.length - a.length)
    .find((word) => memory.findPast(word));
  return { wanted: found ?? "", said: Boolean(found), span: found ? memory.findPast(found) : null };
}

export function verdict(memory, { wanted, said, span }) {
  if (!wanted) return "The answer repeats no long word of what has left the window.";
  if (!span)
    return `${said ? "The answer has" : "The answer lacks"} “${wanted}”, which does not stand in ` +
      "front of the window.";
  const { past, held } = memory.holders(span, memory.size);
  const whole = held.filter((number) => number === past).length;
  const part = held.filter((number) => number > 0).length - whole;
  const by = `${whole} of ${held.length} heads hold it whole, ${part} in part`;
  return said ? `Recalled: “${wanted}”. ${by}.` : `Not recalled: “${wanted}”. ${by}.`;
}
