// One answer of /v1/lola/memory, and the questions that the page has about it.

export const words = (number) => number.toLocaleString("en-US");

export function rangeOf(numbers) {
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  return low === high ? words(low) : `${words(low)} to ${words(high)}`;
}

// First position of the window after so many tokens, sinks aside.
function windowStart(read, { update_interval: C, window_size: window, sinks }) {
  return Math.max(sinks, Math.floor(read / C) * C - window);
}

// Where the first tokens of a text are in a head that holds `size` pairs: the parts add up to `read`.
export function partsOf(read, settings, size) {
  const sinks = Math.min(read, settings.sinks);
  const left = Math.max(0, Math.min(read, windowStart(read, settings)) - sinks);
  const kept = Math.min(left, size);
  return { sinks, kept, folded: left - kept, window: read - sinks - left, size };
}

const sizesOf = (layer) => layer.heads.map((head) => head.sparse_cache_size);

export class Memory {
  // `config` is the server's `lola_config`, null where it is not known.
  constructor(answer, title, config = null) {
    this.answer = answer;
    this.title = title;
    this.config = config;
    this.size = answer.num_tokens;
    this.heads = answer.layers.flatMap(({ layer, heads }) =>
      heads.map((head, index) => ({ ...head, layer, index })));
    this.texts = answer.texts ?? answer.tokens.map((id) => `${id} `);
    this.numHeads = Math.max(...answer.layers.map(({ heads }) => heads.length));
    this.hasHistory = answer.history_interval !== null;
    this.hasForgotten = this.heads.some((head) => head.forgotten);
    // Character at which each token starts, and the whole text: to find spans in it.
    this.starts = [];
    this.text = "";
    for (const text of this.texts) {
      this.starts.push(this.text.length);
      this.text += text;
    }
  }

  // Counts of read tokens at which the caches are known: the last one is the whole prompt.
  get stops() {
    const { history_interval: step } = this.answer;
    const found = [];
    if (this.hasHistory) for (let n = step; n < this.size; n += step) found.push(n);
    return [...found, this.size];
  }

  windowStart(read) {
    return windowStart(read, this.answer);
  }

  // Where a token is after so many tokens: "sink", "past", "window" or "unread".
  place(position, read) {
    if (position >= read) return "unread";
    if (position < this.answer.sinks) return "sink";
    return position >= this.windowStart(read) ? "window" : "past";
  }

  // Heads of a layer and an index in it; null is all of them.
  select(layer, index) {
    return this.heads.filter((head) =>
      (layer === null || head.layer === layer) && (index === null || head.index === index));
  }

  // Positions that a head holds after so many tokens.
  held(head, read) {
    if (read === this.size || !this.hasHistory) return head.positions;
    const stays = head.positions.filter((_, i) => head.entered[i] <= read);
    const gone = head.gone.filter(([, entered, left]) => entered <= read && read < left);
    return [...stays, ...gone.map(([position]) => position)];
  }

  // Per token, how many of the heads hold it.
  counts(heads, read) {
    const found = new Int32Array(this.size);
    for (const head of heads) for (const position of this.held(head, read)) found[position]++;
    return found;
  }

  // Per token, the length of the unbroken run of tokens that a head holds around it, summed over the
  // heads. A number or a name is held as a run; single words of prose are held one by one.
  passages(heads, read) {
    const found = new Int32Array(this.size);
    for (const head of heads) {
      const positions = [...this.held(head, read)].sort((a, b) => a - b);
      for (let start = 0, stop; start < positions.length; start = stop) {
        stop = start + 1;
        while (stop < positions.length && positions[stop] === positions[stop - 1] + 1) stop++;
        for (let i = start; i < stop; i++) found[positions[i]] += stop - start;
      }
    }
    return found;
  }

  // Per token, the mean recall error over those of the heads in which it is folded; 0: in none.
  forgotten(heads) {
    const sums = new Float64Array(this.size);
    const folded = new Int32Array(this.size);
    const { sinks, window_start: stop } = this.answer;
    for (const head of heads) {
      if (!head.forgotten) continue;
      const kept = new Set(head.positions);
      let next = 0;
      for (let position = sinks; position < stop; position++) {
        if (kept.has(position)) continue;
        sums[position] += head.forgotten[next++];
        folded[position]++;
      }
    }
    return sums.map((sum, position) => (folded[position] ? sum / folded[position] : 0));
  }

  // Per token, how many of the heads hold it and do not in the other reading. Only tokens that both
  // have read alike, and that have left the window of both, are compared.
  more(heads, read, other, otherRead) {
    const found = new Int32Array(this.size);
    const stop = Math.min(this.windowStart(read), other.windowStart(otherRead), this.common(other));
    for (const head of heads) {
      const twin = other.heads.find((h) => h.layer === head.layer && h.index === head.index);
      const theirs = new Set(twin ? other.held(twin, otherRead) : []);
      for (const position of this.held(head, read))
        if (position < stop && !theirs.has(position)) found[position]++;
    }
    return found;
  }

  // Tokens that two readings have in common, from the start.
  common(other) {
    const [one, two] = [this.answer.tokens, other.answer.tokens];
    let n = 0;
    while (n < one.length && n < two.length && one[n] === two[n]) n++;
    return n;
  }

  // The tokens that a string of the text touches: first and last; null where it is not.
  find(string, from = 0) {
    const at = string ? this.text.indexOf(string, from) : -1;
    return at < 0 ? null : this.tokensOf(at, at + string.length);
  }

  // The last place of a string that lies before the window.
  findPast(string) {
    if (!string) return null;
    const stop = this.starts[this.answer.window_start] ?? this.text.length;
    const at = this.text.lastIndexOf(string, stop - string.length);
    return at < 0 ? null : this.tokensOf(at, at + string.length);
  }

  tokensOf(start, stop) {
    let first = null, last = null;
    for (let i = 0; i < this.size; i++) {
      const end = this.starts[i] + this.texts[i].length;
      if (end > start && this.starts[i] < stop && this.texts[i].trim()) {
        first ??= i;
        last = i;
      }
    }
    return first === null ? null : { first, last };
  }

  spanText({ first, last }) {
    return this.texts.slice(first, last + 1).join("");
  }

  // Of a span's tokens that have left the window: how many there are, and how many each head holds.
  holders({ first, last }, read) {
    const past = [];
    for (let p = first; p <= last; p++) if (this.place(p, read) === "past") past.push(p);
    const held = this.heads.map((head) => {
      const positions = new Set(this.held(head, read));
      return past.filter((position) => positions.has(position)).length;
    });
    return { past: past.length, held };
  }

  // What each head of a layer holds after so many tokens: the parts add up to `read`.
  parts(layer, read) {
    return sizesOf(layer).map((size) => partsOf(read, this.answer, size));
  }

  // Keys of lola_config that have other values in another reading, with those of this one.
  differences(other) {
    if (!this.config || !other.config) return "";
    const keys = Object.keys({ ...this.config, ...other.config }).filter((key) =>
      JSON.stringify(this.config[key]) !== JSON.stringify(other.config[key]));
    const by = (found) => found.some(Array.isArray) ? "layer and head" : "layer";
    const value = (found) => Array.isArray(found) ? `${rangeOf(found.flat())} by ${by(found)}`
      : typeof found === "string" ? found : JSON.stringify(found) ?? "none";
    return keys.map((key) => `${key} ${value(this.config[key])}`).join(", ");
  }

  // The model and its sizes.
  get settings() {
    const { model, window_size: window, update_interval: step, sinks, layers } = this.answer;
    const room = rangeOf(layers.flatMap(sizesOf));
    return `${model}: window of ${words(window)}, ${words(sinks)} sinks, sparse caches of ${room} ` +
      `pairs, an update every ${words(step)} tokens.`;
  }

  summary(read) {
    const all = this.answer.layers.flatMap((layer) => this.parts(layer, read));
    const range = (name) => rangeOf(all.map((parts) => parts[name]));
    const counts = this.counts(this.heads, read);
    let folded = 0;
    for (let p = 0; p < read; p++) if (this.place(p, read) === "past" && !counts[p]) folded++;
    const many = new Set(all.map((parts) => parts.kept)).size > 1;
    const total = `${words(read)} ${read === 1 ? "token" : "tokens"}`;
    const idle = all.every((parts) => !parts.folded)
      ? ` ${all.some((parts) => parts.kept) ? "Nothing is folded" : "Nothing has left the window"} ` +
        "yet, so no head has had to choose." : "";
    return `${total}. Each head: ${range("sinks")} sinks, ${range("kept")} kept, ` +
      `${range("folded")} folded, ${range("window")} in the window` +
      `${many ? " (kept and folded add up in each head, see below)" : ""}; ` +
      `${words(folded)} ${folded === 1 ? "token is" : "tokens are"} folded in every head.${idle}`;
  }
}
