// A model's text as elements: paragraphs as they are, and blocks of code. Nothing of it is read as
// HTML.

export function render(text) {
  const found = document.createDocumentFragment();
  let lines = [], code = false;
  const flush = () => {
    const words = lines.join("\n");
    lines = [];
    if (!code && !words.trim()) return;
    const inner = document.createElement(code ? "code" : "p");
    inner.textContent = code ? words : words.replace(/^\n+|\s+$/g, "");
    if (!code) return found.append(inner);
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
