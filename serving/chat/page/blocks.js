// A model's text as elements: paragraphs as they are, blocks of code, and code between backticks.
// Nothing of it is read as HTML.

// As many backticks as began it end it, on the same line.
const CODE = /(?<!`)(`+)(?!`)([^\n]*?[^`\n])\1(?!`)/;

export function render(text) {
  const found = document.createDocumentFragment();
  let lines = [], code = false;
  const flush = () => {
    const words = lines.join("\n");
    lines = [];
    if (!code && !words.trim()) return;
    if (!code) return found.append(paragraph(words.replace(/^\n+|\s+$/g, "")));
    const inner = codeOf(words);
    const block = document.createElement("pre");
    block.tabIndex = 0; // it may have to be scrolled
    block.append(inner);
    found.append(block);
  };
  for (const line of text.split("\n"))
    if (/^\s*```/.test(line)) {
      flush();
      code = !code;
    } else lines.push(line);
  if (lines.length) flush();
  return found;
}

function codeOf(text) {
  const made = document.createElement("code");
  made.textContent = text;
  return made;
}

function paragraph(text) {
  const made = document.createElement("p");
  let rest = text;
  for (let at; (at = CODE.exec(rest)); rest = rest.slice(at.index + at[0].length))
    made.append(rest.slice(0, at.index), codeOf(at[2].replace(/^ (.*\S.*) $/, "$1")));
  made.append(rest);
  return made;
}
