// What a sequence holds after so many tokens: numbers, a chart beside a full KV cache, and places.

import { partsOf, rangeOf, words } from "../inspector/memory.js";

const $ = (id) => document.getElementById(id);
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [340, 180, 64, 8, 10, 34];

export function bytes(number) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) {
    number /= 1024;
    unit++;
  }
  return `${unit && number < 100 ? number.toFixed(1) : words(Math.round(number))} ${units[unit]}`;
}

export class Holds {
  // `info` is the server's answer of /v1/lola/info. Its bytes are of one rank.
  constructor(info) {
    const { memory, tensor_parallel_size: ranks, lola_config: lola } = info;
    this.sequence = ranks * memory.bytes_per_sequence;
    this.fullToken = ranks * memory.full_kv_bytes_per_token;
    this.parts = Object.fromEntries(
      Object.entries(memory.parts).map(([name, size]) => [name, ranks * size]));
    this.states = Math.round(memory.bytes_per_sequence / memory.bytes_per_state);
    this.even = memory.break_even_tokens;
    this.lola = lola;
    this.sizes = [lola.sparse_cache_size].flat(2);
  }

  // `turns` are [{ tokens, bytes }] of stored states, as the server told them.
  show(tokens, turns) {
    const full = tokens * this.fullToken;
    $("tokens").textContent = words(tokens);
    $("held").textContent = bytes(this.sequence);
    $("full").textContent = bytes(full);
    const less = tokens < this.even;
    $("crossing").textContent = less
      ? `A full KV cache would be smaller up to ${words(this.even)} tokens: ` +
        `${words(this.even - tokens)} to go.`
      : `A full KV cache would be larger from ${words(this.even)} tokens on.`;
    $("short").textContent =
      `${words(tokens)} tokens in ${bytes(this.sequence)}; full KV cache ${bytes(full)}, ` +
      `${less ? "smaller up to" : "larger from"} ${words(this.even)} tokens`;
    this.draw(tokens, turns);
    this.list(tokens);
  }

  draw(tokens, turns) {
    const most = round(Math.max(2 * this.even, 1.25 * tokens));
    const high = Math.max(most * this.fullToken, this.sequence * 1.1);
    const x = (n) => LEFT + (n / most) * (WIDTH - LEFT - RIGHT);
    const y = (size) => HEIGHT - BOTTOM - (size / high) * (HEIGHT - TOP - BOTTOM);
    const parts = [];
    const line = (name, x1, y1, x2, y2) => parts.push(shape("line", name, { x1, y1, x2, y2 }));
    const text = (name, at, down, content, anchor = "middle") =>
      parts.push(shape("text", name, { x: at, y: down, "text-anchor": anchor }, content));
    line("axis", LEFT, y(0), WIDTH - RIGHT, y(0));
    line("axis", LEFT, TOP, LEFT, y(0));
    for (const share of [0, 0.5, 1]) {
      const anchor = share === 1 ? "end" : "middle";
      text("", x(share * most), HEIGHT - 18, words(share * most), anchor);
    }
    text("", x(most / 2), HEIGHT - 3, "tokens read");
    text("", LEFT - 4, TOP + 8, bytes(high), "end");
    text("", LEFT - 4, y(0), "0", "end");
    const flat = y(this.sequence);
    if (y(0) - flat > 14 && flat - TOP > 20) text("lola", LEFT - 4, flat + 4, bytes(this.sequence), "end");
    line("full", x(0), y(0), x(most), y(most * this.fullToken));
    line("lola", x(0), flat, x(most), flat);
    line("now", x(tokens), TOP, x(tokens), y(0));
    for (const turn of turns)
      parts.push(shape("circle", "lola",
        { cx: x(turn.tokens), cy: y(turn.bytes * this.states), r: 3.5 }));
    parts.push(shape("circle", "full", { cx: x(tokens), cy: y(tokens * this.fullToken), r: 3.5 }));
    $("chart").replaceChildren(...parts);
    $("chart").setAttribute("aria-label", `Memory by tokens read: this chat stays at ` +
      `${bytes(this.sequence)}; a full KV cache grows to ${bytes(tokens * this.fullToken)} at ` +
      `${words(tokens)} tokens`);
  }

  // Where the tokens are, by the sizes of the heads.
  list(tokens) {
    const settings = { ...this.lola, sinks: this.lola.sink_size };
    const heads = this.sizes.map((size) => partsOf(tokens, settings, size));
    const [{ sinks, window }] = heads;
    const { sinks: sinkBytes, window: windowBytes, H = 0, s = 0, ...others } = this.parts;
    const pairs = ["sparse K/V", "positions", "score_weights"]
      .reduce((sum, name) => sum + (others[name] ?? 0), 0);
    const known = sinkBytes + windowBytes + pairs + H + s;
    const all = Object.values(this.parts).reduce((sum, size) => sum + size, 0);
    const rows = [
      ["sinks, exact", words(sinks), sinkBytes],
      ["window, exact", words(window), windowBytes],
      ["sparse pairs, exact", rangeOf(heads.map(({ kept }) => kept)), pairs],
      ["hidden state, summed", rangeOf(heads.map(({ folded }) => folded)), H + s],
    ];
    if (all > known) rows.push(["the rest", "", all - known]);
    $("places").replaceChildren(...rows.map(([name, number, size]) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = name;
      row.append(head, ...[number, bytes(size)].map((content) => {
        const cell = document.createElement("td");
        cell.textContent = content;
        return cell;
      }));
      return row;
    }));
    $("places-note").textContent = (this.states > 1
      ? `A running sequence holds ${this.states} such states. ` : "") +
      (tokens > sinks + window ? "Each head has every token in one of the four places."
        : "Nothing has left the window yet.");
  }
}

// The next number of 1, 2, 4 or 6 with zeros.
function round(number) {
  const step = 10 ** Math.floor(Math.log10(number));
  return [1, 2, 4, 6, 10].map((times) => times * step).find((found) => found >= number);
}

function shape(kind, name, fields, content = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  if (name) made.setAttribute("class", name);
  for (const [field, value] of Object.entries(fields)) made.setAttribute(field, value);
  made.textContent = content;
  return made;
}
