// What is shown of the readings: one state, which controls change and which all parts follow.

export const DEFAULTS = {
  layer: null, // an index of the model, null: all
  head: null,
  colour: "passages", // "passages", "held", "forgotten" or "change"
  least: 1, // heads that must hold a token for it to be coloured
  top: null, // tokens that are coloured at most, null: a tenth of them
  span: null, // { first, last }
};

export const view = { ...DEFAULTS };

const listeners = [];

export function follow(listener) {
  listeners.push(listener);
}

export function change(fields) {
  Object.assign(view, fields);
  for (const listener of listeners) listener(view);
}
