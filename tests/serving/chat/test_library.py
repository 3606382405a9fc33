"""The chat page brings text back: of a library for a first message, of the chat itself later on."""

import re

import pytest

from tests.serving.chat.test_page import ask, new_chat, said, session, text_of, value
from tests.serving.library.test_routes import GARDEN, add, ok
from tests.serving.sessions.test_past import QUESTION, SEGMENT, TEXT
from tests.serving.sessions.test_routes import BASE
from tests.support.browser import chromium
from tests.support.inspector import TAB
from tests.support.servers import KEY

NAME = "recalled-on-the-page"


@pytest.fixture
def browser(tiny):
    ok(add(tiny, "chatted", "garden.txt", GARDEN, replace=True))
    with chromium() as running:
        ok(tiny.client.post(f"{BASE}/{NAME}/append", json={"prompt": TEXT}))
        running.open(f"{tiny.url}/#{NAME}")
        running.type("#key", KEY)
        running.keys(TAB)
        running.wait(lambda: running.text("#tokens") and running.text("#status") == "")
        running.errors()  # those of no key
        running.type("#max-tokens", "4")
        running.type("#temperature", "0")
        yield running
    tiny.client.delete(f"{BASE}/{NAME}")


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


def notes_of(browser, text):
    before = len(said(browser, ".note"))
    ask(browser, text)
    browser.wait(lambda: said(browser, ".note")[-1].startswith("turn "))
    return said(browser, ".note")[before:]


def test_what_came_back_is_named_and_not_counted(browser, tiny):
    covered = session(tiny, NAME)["tokens"]
    assert not browser.run("return document.getElementById('recall').checked")
    assert not [note for note in notes_of(browser, QUESTION) if note.startswith("recalled")]
    browser.click("#recall")
    before, notes = session(tiny, NAME)["tokens"], notes_of(browser, QUESTION)
    recalled = next(note for note in notes if note.startswith("recalled"))
    # Which of the two it is, a model of random weights decides.
    first, last = map(int, re.findall(r"\d+", recalled.partition(": ")[0]))
    assert first in (0, SEGMENT) and last == first + SEGMENT - 1
    assert recalled.partition(": ")[2] in TEXT
    found = session(tiny, NAME)
    assert found["turn"] == 3 and found["tokens"] > before > covered
    read = int(notes[-1].partition(" restored, ")[2].split()[0])
    assert 0 < read < 100 < SEGMENT
    assert browser.text("#tokens") == f"{found['tokens']:,}" and value(browser, "name") == NAME
