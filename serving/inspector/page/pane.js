// One reading on the page: its summary, its timeline, and its text in colours.

import { rangeOf, words } from "./memory.js";
import { change, view } from "./view.js";
import { hideTip, showTip } from "./tip.js";

const LEVELS = 8; // of colour, see style.css

// Tokens that are coloured at most, unless somebody wants others.
export const tenth = (past) => Math.max(20, Math.round(past / 10));

export class Pane {
  // `root` is a copy of the template; `other` gives the pane to compare with, or null.
  constructor(root, other) {
    this.root = root;
    this.other = other;
    this.memory = null;
    this.read = 0;
    const part = (name) => root.querySelector(`[data-part=${name}]`);
    this.parts = Object.fromEntries(
      ["title", "settings", "summary", "time", "time-name", "time-row", "layers", "text"]
        .map((name) => [name, part(name)]));
    this.parts.time.addEventListener("input", () => {
      this.read = this.memory.stops[this.parts.time.value];
      this.moved?.();
    });
    this.watchText();
  }

  show(memory, read = memory.size) {
    this.memory = memory;
    const { stops } = memory;
    this.read = stops.includes(read) ? read : memory.size;
    this.parts.title.textContent = memory.title;
    this.parts.time.max = stops.length - 1;
    this.parts.time.value = stops.indexOf(this.read);
    this.parts["time-row"].hidden = stops.length < 2;
    this.spans = memory.texts.map((text, position) => {
      const span = document.createElement("span");
      span.dataset.position = position;
      span.textContent = text;
      return span;
    });
    this.cursor = null;
    this.parts.text.replaceChildren(...this.spans);
    this.root.hidden = false;
  }

  close() {
    this.memory = null;
    this.root.hidden = true;
    this.parts.text.replaceChildren();
  }

  scrollTo({ first }) {
    this.spans[first].scrollIntoView({ block: "center" });
  }

  // Shows a span in the box of the text, and leaves the page where it is.
  bring({ first }) {
    const { text } = this.parts, span = this.spans[first];
    text.scrollTop += span.getBoundingClientRect().top - text.getBoundingClientRect().top -
      text.clientHeight / 2;
  }

  paint() {
    if (!this.memory) return;
    const { memory, read } = this;
    const heads = memory.select(view.layer, view.head);
    const counts = memory.counts(heads, read);
    const values = this.values(heads, counts);
    const levels = this.levels(values, counts);
    this.spans.forEach((span, position) => {
      const { first, last } = view.span ?? { first: 1, last: 0 };
      const chosen = position >= first && position <= last;
      const cursor = position === this.cursor;
      span.className = `token ${memory.place(position, read)}` +
        `${chosen ? " chosen" : ""}${cursor ? " cursor" : ""}`;
      span.dataset.held = counts[position];
      span.dataset.level = levels[position];
    });
    this.parts.text.dataset.colour = view.colour;
    this.parts.settings.textContent = this.settings();
    this.parts.summary.textContent = memory.summary(read);
    this.parts["time-name"].textContent = `${words(read)} of ${words(memory.size)}`;
    this.parts.time.setAttribute("aria-valuetext", `${read} of ${memory.size} tokens read`);
    this.listLayers();
  }

  settings() {
    const other = this.other();
    const differences = other ? this.memory.differences(other.memory) : "";
    return this.memory.settings + (differences && ` Unlike the other side: ${differences}.`);
  }

  values(heads, counts) {
    const other = this.other();
    if (view.colour === "forgotten") {
      // Errors are known against the state after the last token only.
      return this.read === this.memory.size ? this.memory.forgotten(heads) : counts.map(() => 0);
    }
    if (view.colour === "change")
      return other ? this.memory.more(heads, this.read, other.memory, other.read)
        : counts.map(() => 0);
    // Of one head every token that it holds is shown alike.
    return view.colour === "passages" && heads.length > 1
      ? this.memory.passages(heads, this.read) : counts;
  }

  // 0 to LEVELS per token: the largest observed value has the strongest colour, the least of those
  // that are coloured the palest. Tokens that tie with the last one are coloured too.
  levels(values, counts) {
    const ofHeld = ["passages", "held"].includes(view.colour);
    const shown = [];
    values.forEach((value, position) => {
      if (value > 0 && (!ofHeld || counts[position] >= view.least) &&
          this.memory.place(position, this.read) === "past") shown.push(value);
    });
    shown.sort((a, b) => b - a);
    const past = Math.max(0, this.memory.windowStart(this.read) - this.memory.answer.sinks);
    const low = shown[Math.min(shown.length, view.top ?? tenth(past)) - 1] ?? Infinity;
    const high = shown[0];
    return values.map((value, position) => {
      if (!(value >= low) || (ofHeld && counts[position] < view.least)) return 0;
      if (this.memory.place(position, this.read) !== "past") return 0;
      const share = high > low ? (value - low) / (high - low) : 1;
      return 1 + Math.round(share * (LEVELS - 1));
    });
  }

  listLayers() {
    const rows = this.memory.answer.layers.map((layer) => {
      const row = document.createElement("tr");
      const heads = this.memory.parts(layer, this.read);
      const columns = ["sinks", "kept", "folded", "window", "size"];
      const ranges = columns.map((name) => rangeOf(heads.map((head) => head[name])));
      for (const value of [words(layer.layer), ...ranges]) {
        const cell = document.createElement(row.children.length ? "td" : "th");
        if (!row.children.length) cell.scope = "row";
        cell.textContent = value;
        row.append(cell);
      }
      return row;
    });
    this.parts.layers.replaceChildren(...rows);
  }

  watchText() {
    const { text } = this.parts;
    const position = (node) => {
      const span = (node?.nodeType === Node.TEXT_NODE ? node.parentElement : node)
        ?.closest?.(".token");
      return span && text.contains(span) ? Number(span.dataset.position) : null;
    };
    text.addEventListener("mouseover", (event) => {
      const at = position(event.target);
      if (at !== null) showTip(this.describe(at), event.clientX, event.clientY);
    });
    text.addEventListener("mouseout", hideTip);
    // A token, or the selection that ends there. A selection that stops before the first character
    // of a token has not touched that token.
    const take = (at) => {
      const chosen = getSelection();
      const ends = [position(chosen.anchorNode), position(chosen.focusNode)];
      if (chosen.isCollapsed || ends.includes(null)) {
        if (at !== null) this.choose(at, at);
        return;
      }
      const [first, last] = ends.sort((a, b) => a - b);
      const open = chosen.getRangeAt(0).endOffset === 0 && last > first;
      this.choose(first, open ? last - 1 : last);
    };
    let touched = false;
    text.addEventListener("pointerup", (event) => {
      touched = event.pointerType === "touch";
      setTimeout(() => take(position(event.target)));
    });
    // By touch a selection is made without the page's doing, and moved by its handles.
    text.addEventListener("pointercancel", () => { touched = true; });
    let waiting = 0;
    document.addEventListener("selectionchange", () => {
      clearTimeout(waiting);
      if (touched) waiting = setTimeout(() => take(null), 300);
    });
    text.addEventListener("keydown", (event) => this.press(event));
    text.addEventListener("blur", () => {
      hideTip();
      this.spans?.[this.cursor]?.classList.remove("cursor");
    });
  }

  // Arrows move a cursor over the tokens; with Shift they extend the span.
  press(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 };
    if (event.key === "Escape") {
      hideTip();
      change({ span: null });
    } else if (event.key in steps && this.memory) {
      event.preventDefault();
      const from = this.cursor ?? (view.span?.first ?? 0) - steps[event.key];
      const limit = this.memory.size - 1;
      this.cursor = Math.min(limit, Math.max(0, from + steps[event.key]));
      if (event.shiftKey) {
        this.anchor ??= from;
        const [first, last] = [this.anchor, this.cursor].sort((a, b) => a - b);
        this.choose(first, last);
      } else {
        this.anchor = null;
        this.choose(this.cursor, this.cursor);
      }
      const span = this.spans[this.cursor];
      span.scrollIntoView({ block: "nearest" });
      const box = span.getBoundingClientRect();
      showTip(this.describe(this.cursor), box.left, box.bottom);
    }
  }

  choose(first, last) {
    change({ span: { first, last } });
  }

  describe(position) {
    const { memory, read } = this;
    const { answer } = memory;
    const heads = memory.select(view.layer, view.head);
    const text = answer.texts === null ? "" : `${JSON.stringify(answer.texts[position])}, `;
    const lines = [`${text}position ${position}, id ${answer.tokens[position]}`];
    if (answer.rope_positions && answer.rope_positions[position] !== position)
      lines.push(`its RoPE position is ${answer.rope_positions[position]}, in a context shifted by ` +
        `${words(answer.shifted_by)}`);
    const where = memory.place(position, read);
    if (where === "unread") lines.push("not read yet");
    else if (where === "sink") lines.push("a sink: exact in every head");
    else if (where === "window") lines.push("in the window: exact in every head");
    else lines.push(...this.describePast(position, heads));
    return lines.join("\n");
  }

  describePast(position, heads) {
    const { memory, read } = this;
    const holding = heads.filter((head) => memory.held(head, read).includes(position));
    const lines = [holding.length ? `held by ${holding.length} of ${heads.length} heads`
      : "in the hidden state of every head selected"];
    const now = read === memory.size;
    const name = memory.answer.error === "sre" ? "recall error" : "relative recall error";
    if (now && holding.length)
      lines.push(`${name} ${spread(holding.map((h) => h.errors[h.positions.indexOf(position)]))}`);
    if (now && memory.hasForgotten && holding.length < heads.length)
      lines.push(`${name} where it is folded ` +
        memory.forgotten(heads)[position].toPrecision(4));
    if (memory.hasHistory) lines.push(...this.describeStays(position, heads));
    return lines;
  }

  describeStays(position, heads) {
    const entered = [], left = [];
    for (const head of heads) {
      const at = head.positions.indexOf(position);
      if (at >= 0) entered.push(head.entered[at]);
      for (const [gone, start, stop] of head.gone)
        if (gone === position) {
          entered.push(start);
          left.push(stop);
        }
    }
    if (!entered.length) return ["folded when it left the window"];
    const lines = [`entered ${entered.length} ${entered.length === 1 ? "cache" : "caches"} after ` +
      `${words(Math.min(...entered))} tokens`];
    if (left.length) {
      const [low, high] = [Math.min(...left), Math.max(...left)].map(words);
      lines.push(`left ${left.length} of them after ${low === high ? low : `${low} to ${high}`}`);
    }
    return lines;
  }
}

function spread(errors) {
  const mean = errors.reduce((sum, error) => sum + error, 0) / errors.length;
  if (errors.length === 1) return mean.toPrecision(4);
  const [low, high] = [Math.min(...errors), Math.max(...errors)].map((e) => e.toPrecision(4));
  return `${mean.toPrecision(4)} on average, ${low} to ${high}`;
}
