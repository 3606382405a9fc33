"""The memory inspector in a browser, and what tests read off it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.browser import Browser

# Pictures of the page: what a person sees. Not in git.
PICTURES = Path(__file__).parents[2] / "build" / "pictures"
RIGHT, LEFT, END, HOME, ESCAPE = "\ue014", "\ue012", "\ue010", "\ue011", "\ue00c"
CONTROL, SHIFT, ENTER, TAB = "\ue009", "\ue008", "\ue007", "\ue004"


class Page:
    """A browser that shows the inspector."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def open(self, url: str, key: str = "") -> None:
        self.browser.open("about:blank")  # else another end of the address loads nothing
        self.browser.open(url)
        self.ready()
        if key:
            self.browser.type("#key", key)

    def ready(self) -> None:
        script = "return document.querySelectorAll('.pane').length"
        self.browser.wait(lambda: self.browser.run(script))

    def prompt(self, text: str, kind: str = "prompt") -> None:
        """Fill in a text. By script: a driver's keys cannot be any character."""
        self.browser.click(f"[name=kind][value={kind}]")
        self.browser.run("document.getElementById('prompt').value = arguments[0]", text)

    def show(self, *, timeline: bool = True) -> None:
        """Press the button and wait for all that comes."""
        self.browser.run("document.querySelector('#panes .text').replaceChildren()")
        self.browser.click("#run")
        self.settle(timeline=timeline)

    def settle(self, *, timeline: bool = True) -> None:
        def there() -> Any:
            shown = self.browser.run("return document.querySelectorAll('#panes .token').length")
            waits = timeline and self.browser.run(
                "return document.querySelector('[data-part=time-row]').hidden"
            )
            assert self.browser.run("return document.getElementById('status').className") == "", (
                self.browser.text("#status")
            )
            return shown and not waits and not self.browser.text("#status")

        self.browser.wait(there)

    def slide(self, name: str, value: int) -> None:
        """Move a slider with the keyboard, as a person may."""
        self.browser.press(f"#{name}", HOME)
        if value:
            self.browser.press(f"#{name}", RIGHT * value)

    def set(self, selector: str, value: object) -> None:
        """Give a control a value at once."""
        self.browser.run(
            "const c = document.querySelector(arguments[0]); c.value = arguments[1];"
            "for (const name of ['input', 'change']) c.dispatchEvent(new Event(name))",
            selector, value,
        )  # fmt: skip

    def time(self, stop: int, pane: int = 0) -> None:
        """Move a timeline to its stop of this number."""
        self.browser.run(
            "const c = document.querySelectorAll('[data-part=time]')[arguments[0]];"
            "c.value = arguments[1]; c.dispatchEvent(new Event('input'))",
            pane, stop,
        )  # fmt: skip

    def tokens(self, field: str, pane: int = 0) -> list[Any]:
        """Of each token of a pane: a field of its data, or a property of the element."""
        return self.browser.run(
            "const pane = document.querySelectorAll('.pane')[arguments[1]];"
            "return [...pane.querySelectorAll('.token')]"
            ".map((s) => s.dataset[arguments[0]] ?? s[arguments[0]])",
            field, pane,
        )  # fmt: skip

    def held(self, pane: int = 0) -> list[int]:
        return list(map(int, self.tokens("held", pane)))

    def levels(self, pane: int = 0) -> list[int]:
        return list(map(int, self.tokens("level", pane)))

    def cells(self) -> dict[tuple[int, int], int]:
        """The grid: by layer and head, the number that it says."""
        rows = self.browser.run(
            "return [...document.querySelectorAll('#heatmap button')]"
            ".map((b) => [+b.dataset.layer, +b.dataset.head, +b.dataset.held])"
        )
        return {(layer, head): held for layer, head, held in rows}

    def chosen(self) -> list[int]:
        script = (
            "return [...document.querySelectorAll('.pane .chosen')].map((s) => +s.dataset.position)"
        )
        return list(self.browser.run(script))

    def token(self, position: int, pane: int = 1) -> str:
        """Selector of a token of the first or second pane."""
        return f'.pane:nth-of-type({pane}) [data-position="{position}"]'
