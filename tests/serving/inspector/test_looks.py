"""How the inspector looks and is used: sizes, schemes, contrast, keyboard. Pictures are kept."""

import itertools

import pytest

from lola_vllm.serving.inspector import ROUTE
from tests.support.axe import findings
from tests.support.browser import chromium
from tests.support.inspector import PICTURES, TAB, Page
from tests.support.servers import KEY

DESKTOP, PHONE = (1280, 800), (390, 844)
PHONE_HEIGHT = 2500  # of the page with the example on it, at most


@pytest.fixture(scope="module")
def page(lola_server):
    """The example, with its answer."""
    with chromium() as browser:
        browser.resize(*DESKTOP)
        page = Page(browser)
        page.open(lola_server.url + ROUTE)
        browser.wait(lambda: browser.text("#status"))
        browser.picture(PICTURES / "inspector-start-1280x800.png")
        # What an empty page says, and where it leads.
        assert browser.text("#intro").count(".") >= 3 and in_view(browser, "#example")
        links = "return [...document.querySelectorAll('nav a')].map((a) => a.href)"
        assert browser.run(links) == [f"{lola_server.url}/", f"{lola_server.url}/docs"]
        browser.type("#key", KEY)
        browser.click("#example")
        browser.wait(lambda: browser.text("#verdict"), 120)
        page.settle()
        yield page


def in_view(browser, selector):
    """Whether all of an element can be seen."""
    script = (
        "const e = document.querySelector(arguments[0]), b = e.getBoundingClientRect();"
        "const top = document.elementFromPoint(b.left + b.width / 2, b.top + b.height / 2);"
        "return b.top >= 0 && b.bottom <= innerHeight && b.left >= 0 && b.right <= innerWidth"
        " && (e === top || e.contains(top))"
    )
    return browser.run(script, selector)


def test_the_answer_and_the_found_number_are_above_the_fold(page):
    browser = page.browser
    browser.resize(1280, 900)
    browser.run("scrollTo(0, 0)")
    for selector in ("#answer", "#verdict", page.token(page.chosen()[0])):
        assert in_view(browser, selector), selector
    browser.hover("#find")
    # Such a picture is the README's.
    browser.picture(PICTURES / "inspector-fold-1280x900.png")


def test_a_phone_folds_what_is_not_looked_at(page):
    browser = page.browser
    browser.resize(*PHONE)
    browser.run("scrollTo(0, 0)")
    assert browser.run("return document.scrollingElement.scrollHeight") <= PHONE_HEIGHT
    shown = "return document.getElementById(arguments[0]).checkVisibility()"
    assert not browser.run(shown, "prompt") and not browser.run(shown, "keep")
    browser.click("#asked summary")
    assert browser.run(shown, "prompt")
    browser.resize(*DESKTOP)
    browser.wait(lambda: browser.run(shown, "keep") and browser.run(shown, "prompt"))
    assert not browser.run("return document.querySelector('#asked summary').checkVisibility()")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_fits_the_screen_controls_stay_in_view_and_axe_finds_nothing(page, size, dark):
    browser = page.browser
    browser.resize(*size, dark=dark)
    name = f"{size[0]}x{size[1]}{'-dark' if dark else ''}"
    browser.run("scrollTo(0, 0)")
    browser.picture(PICTURES / f"inspector-top-{name}.png")
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    browser.click("#goto")
    assert in_view(browser, page.token(page.chosen()[0]))
    for selector in ("#layer", "#head", "#least", "#top", "#find", "[data-part=time]"):
        assert in_view(browser, selector), selector
    browser.hover("#find")  # and not a token, whose tip would hide others
    browser.picture(PICTURES / f"inspector-{name}.png")
    browser.run("scrollTo(0, 0)")
    assert findings(browser) == []
    browser.run("document.getElementById('keep').click()")  # it may be folded
    page.time(9)
    browser.picture(PICTURES / f"inspector-two-sides-{name}.png")
    found = findings(browser)
    browser.run("document.getElementById('alone').click()")
    page.time(99)
    assert found == []


def test_a_token_is_chosen_with_a_finger(page):
    browser = page.browser
    browser.resize(*PHONE)
    before = page.chosen()
    browser.click("#goto")
    browser.tap(page.token(before[-1] + 3))
    browser.wait(lambda: page.chosen() == [before[-1] + 3])
    browser.type("#find", "7319482")
    browser.keys("\ue004")
    assert page.chosen() == before


def luminance(colour):
    parts = [int(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", ["passages", "forgotten"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_level_can_be_read_and_told_from_the_next(page, dark, colour):
    """WCAG AA: a contrast of 4.5 between a token and what is behind it, at each strength."""
    browser = page.browser
    browser.resize(*DESKTOP, dark=dark)
    page.set("#colour", colour)
    behind = []
    for level in range(9):
        ink, paper = browser.run(
            "const s = document.querySelector('.text .past'), old = s.dataset.level;"
            "s.dataset.level = arguments[0]; const c = getComputedStyle(s);"
            "const found = [c.color, c.backgroundColor]; s.dataset.level = old; return found",
            level,
        )
        if level == 0:  # nothing of its own is behind it
            paper = browser.run("return getComputedStyle(document.body).backgroundColor")
        low, high = sorted((luminance(ink), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, level
        behind.append(luminance(paper))
    page.set("#colour", "passages")
    steps = [(a - b) * (1 if dark else -1) for a, b in itertools.pairwise(behind)]
    assert all(step < 0 for step in steps), behind


def test_everything_can_be_reached_by_keyboard(page):
    browser = page.browser
    browser.resize(*DESKTOP)
    browser.run("document.activeElement.blur(); scrollTo(0, 0)")
    reached = []
    for _ in range(60):
        browser.keys(TAB)
        name = browser.run(
            "const e = document.activeElement;"
            "return e === document.body ? '' : e.id || e.className || e.dataset.part || e.tagName"
        )
        if reached and name == reached[0]:
            break
        reached.append(name)
    wanted = {"prompt", "key", "run", "example", "detail", "layer", "head", "least", "top",
              "colour", "find", "goto", "clear", "expected", "max-tokens", "answer-run", "keep",
              "save", "link", "open", "text", "time", "SUMMARY"}  # fmt: skip
    assert wanted <= set(reached), wanted - set(reached)
    # The grid is one stop; arrows move in it.
    assert sum(name == "BUTTON" for name in reached) == 1


def test_nothing_is_loaded_from_elsewhere(page, lola_server):
    names = page.browser.run(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert len(names) > 10 and all(name.startswith(lola_server.url) for name in names)
