// Code and tables that are wider than the page can be scrolled with the keyboard.
function reach(wide) {
  if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
  else wide.removeAttribute("tabindex");
}
// After the theme, which takes the attribute away where no mouse is.
const sizes = new ResizeObserver((entries) =>
  setTimeout(() => entries.forEach(({ target }) => reach(target))));
addEventListener("load", () => { // by then the theme has put tables into frames
  for (const wide of document.querySelectorAll("pre > code, .md-typeset__scrollwrap"))
    sizes.observe(wide);
});
