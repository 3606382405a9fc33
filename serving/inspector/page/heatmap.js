// Layers and heads as a grid to click: which of them hold the chosen span.

import { words } from "./memory.js";
import { change, view } from "./view.js";

const LEVELS = 8;
// In CSS pixels: what the grid may take, a cell with its gap, the label before a row.
const [WIDTH, CELL, LABEL] = [325, 27, 25];

export class Heatmap {
  constructor(grid, note) {
    this.grid = grid;
    this.note = note;
    grid.addEventListener("click", ({ target }) => {
      const cell = target.closest("button");
      if (cell) this.toggle(cell);
    });
    grid.addEventListener("keydown", (event) => this.press(event));
  }

  // Layers lie below each other, in as many banks side by side as there is room for.
  show(memory) {
    this.memory = memory;
    const { layers } = memory.answer;
    const banks = Math.max(1, Math.floor(WIDTH / (memory.numHeads * CELL + LABEL)));
    const rows = Math.ceil(layers.length / banks);
    const cells = [];
    const column = (row) => Math.floor(row / rows) * (memory.numHeads + 1);
    layers.forEach(({ layer }, row) => {
      if (row % rows === 0)
        for (let index = 0; index < memory.numHeads; index++)
          cells.push(label(index, 0, column(row) + index + 1));
      cells.push(label(layer, 1 + (row % rows), column(row)));
    });
    this.buttons = memory.heads.map((head) => {
      const cell = document.createElement("button");
      cell.type = "button";
      cell.dataset.layer = head.layer;
      cell.dataset.head = head.index;
      const row = layers.findIndex(({ layer }) => layer === head.layer);
      place(cell, 1 + (row % rows), column(row) + head.index + 1);
      cell.tabIndex = -1;
      return cell;
    });
    if (this.buttons.length) this.buttons[0].tabIndex = 0;
    this.grid.replaceChildren(...cells, ...this.buttons);
  }

  paint(read) {
    const { memory } = this;
    const span = view.span;
    const { past, held } = span ? memory.holders(span, read)
      : { past: 0, held: memory.heads.map((head) => memory.held(head, read).length) };
    const high = Math.max(1, ...held);
    this.buttons.forEach((cell, i) => {
      const { layer, index } = memory.heads[i];
      const level = held[i] ? 1 + Math.round((held[i] / high) * (LEVELS - 1)) : 0;
      cell.dataset.level = level;
      cell.dataset.held = held[i];
      const pressed = view.layer === layer && view.head === index;
      cell.setAttribute("aria-pressed", String(pressed));
      const of = span ? `${held[i]} of ${past} tokens of the span` : `${held[i]} tokens`;
      cell.setAttribute("aria-label", `layer ${layer}, head ${index}: holds ${of}`);
      cell.title = `layer ${layer}, head ${index}\nholds ${of}`;
    });
    this.note.textContent = span ? spanNote(memory, span, read, past, held)
      : "Number of tokens that each head holds. Select a span of the text to see which heads hold it.";
  }

  toggle(cell) {
    const [layer, head] = [Number(cell.dataset.layer), Number(cell.dataset.head)];
    const same = view.layer === layer && view.head === head;
    this.focus(cell);
    change(same ? { layer: null, head: null } : { layer, head });
  }

  focus(cell) {
    for (const button of this.buttons) button.tabIndex = button === cell ? 0 : -1;
    cell.focus();
  }

  press(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const cell = event.target.closest("button");
    if (!cell || !(event.key in moves)) return;
    event.preventDefault();
    const [rows, columns] = moves[event.key];
    const layers = this.memory.answer.layers.map(({ layer }) => layer);
    const row = layers.indexOf(Number(cell.dataset.layer)) + rows;
    const head = Number(cell.dataset.head) + columns;
    const next = this.buttons.find((button) =>
      Number(button.dataset.layer) === layers[row] && Number(button.dataset.head) === head);
    if (next) this.focus(next);
  }
}

function spanNote(memory, span, read, past, held) {
  const text = memory.spanText(span).replace(/\s+/g, " ");
  const shown = text.length > 60 ? `${text.slice(0, 57)}…` : text;
  const count = span.last - span.first + 1;
  const start = `“${shown}” (${words(count)} ${count === 1 ? "token" : "tokens"}): `;
  if (span.first >= read) return `${start}not read yet.`;
  if (!past) return `${start}none of it has left the window, it is exact in every head.`;
  const whole = memory.heads.filter((_, i) => held[i] === past);
  const part = held.filter((number) => number > 0).length - whole.length;
  const names = whole.slice(0, 5).map(({ layer, index }) => `layer ${layer} head ${index}`);
  const list = names.length ? ` (${names.join(", ")}${whole.length > 5 ? ", …" : ""})` : "";
  return `${start}held whole by ${whole.length} of ${memory.heads.length} heads${list}, ` +
    `in part by ${part}.`;
}

function label(text, row, column) {
  const cell = document.createElement("span");
  cell.textContent = text;
  cell.setAttribute("aria-hidden", "true");
  place(cell, row, column);
  return cell;
}

function place(cell, row, column) {
  cell.style.setProperty("--row", row + 1);
  cell.style.setProperty("--column", column + 1);
}
