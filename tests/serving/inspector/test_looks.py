"""How the inspector looks and is used: sizes, schemes, contrast, keyboard. Pictures are kept."""

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


@pytest.mark.parametrize(
    ("size", "dark"), [(DESKTOP, True), (PHONE, False)], ids=["desktop", "phone"]
)
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
