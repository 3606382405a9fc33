"""The chat page asks a library: a chat begins with what its first message reads there."""

from __future__ import annotations

import pytest

from tests.serving.chat.test_page import ask, new_chat, said, session, text_of, value
from tests.serving.library.test_routes import GARDEN, add, ok
from tests.support.browser import chromium
from tests.support.inspector import TAB
from tests.support.servers import KEY


@pytest.fixture
def browser(tiny):
    ok(add(tiny, "chatted", "garden.txt", GARDEN, replace=True))
    with chromium() as running:
        running.open(f"{tiny.url}/")
        running.type("#key", KEY)
        running.keys(TAB)
        running.wait(lambda: running.text("#tokens") and running.text("#status") == "")
        yield running


def test_a_chat_begins_with_what_a_library_says(browser, tiny):
    name = new_chat(browser, most=4)
    browser.click("#begin summary")
    options = "return [...document.querySelectorAll('#libraries option')].map((o) => o.value)"
    browser.wait(lambda: "chatted" in browser.run(options))
    browser.type("#library", "chatted")
    ask(browser, "Where is the window read by the model?")
    assert any(note.startswith("[1] garden.txt, part ") for note in said(browser, ".note"))
    assert session(tiny, name)["turn"] == 2  # what was composed, and the answer
    assert "in the garden" in text_of(tiny, name)
    kept = browser.run("return JSON.parse(localStorage.getItem('lola-libraries'))")
    assert kept == ["chatted"]
    browser.type("#library", "none-such")
    other = new_chat(browser)
    assert value(browser, "library") == "" and other != name
