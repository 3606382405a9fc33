"""The inspector asks a library in a real browser, and shows where the answer came from."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lola_vllm.serving.inspector import ROUTE, page_file
from tests.support.axe import findings
from tests.support.browser import chromium
from tests.support.inspector import TAB, Page
from tests.support.servers import KEY

LIBRARIES = "/v1/lola/libraries"
GARDEN = "The hidden state of the window is read by the model in the garden. " * 30
# A sentence that a line break parts: the page finds it all the same, with all that has a meaning in
# patterns.
BOATS = "The cache (of [pairs]) *holds*\n  the score + 1 at the harbour? "
HARBOUR = GARDEN.replace("garden", "window")[:600] + ".\n" + BOATS + GARDEN[:600]
QUESTION = "The cache (of [pairs]) *holds* the score + 1 at the harbour?"


@pytest.fixture(scope="module")
def shelf(tiny):
    for document, text in (("garden.txt", GARDEN), ("boats/harbour.txt", HARBOUR)):
        body = {"document": document, "text": text, "part_tokens": 240}
        answer = tiny.client.post(f"{LIBRARIES}/inspected/documents", json=body)
        assert answer.status_code == 200, answer.text
    return tiny


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser, shelf):
    """Ready to ask the library."""
    page = Page(browser)
    page.open(shelf.url + ROUTE, KEY)
    browser.keys(TAB)
    choose(browser)
    browser.wait(lambda: "inspected" in listed(browser))
    page.set("#library", "inspected")
    return page


def choose(browser):
    browser.click("[name=kind][value=library]")


def listed(browser):
    return browser.run(
        "return [...document.querySelectorAll('#libraries option')].map(o => o.value)"
    )


def ask(page, question=QUESTION):
    page.browser.run("document.getElementById('prompt').value = arguments[0]", question)
    page.browser.click("#run")


def answered(page):
    browser = page.browser
    browser.wait(lambda: browser.text("#run") == "Ask the library" and not browser.text("#status"))
    return browser.run("return [...document.querySelectorAll('#sources li')].map(e => e.innerText)")


def hidden(browser, name):
    return browser.run("return !document.getElementById(arguments[0]).checkVisibility()", name)


def test_the_answer_and_its_sources_are_those_of_the_server(page, shelf):
    browser = page.browser
    assert (browser.text("#prompt-name"), browser.text("#run")) == ("Question", "Ask the library")
    ask(page)
    shown = answered(page)
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 256}
    answer = shelf.client.post(f"{LIBRARIES}/inspected/chat", json={**body, "temperature": 0})
    answer = answer.json()
    said = browser.run("return document.getElementById('told-answer').textContent")
    assert said == answer["choices"][0]["message"]["content"] and said
    assert len(shown) == len(answer["sources"]) >= 1
    for text, source in zip(shown, answer["sources"], strict=True):
        title = source["document"]
        if source["parts"] > 1:
            title += f", part {source['part']} of {source['parts']}"
        assert text.startswith(title) and source["sentence"] in text
        share, score = re.search(r"(\d+) % of what was found, score ([\d.e+]+)", text).groups()
        assert int(share) == pytest.approx(100 * source["share"], abs=0.51)
        assert float(score) == pytest.approx(source["score"], rel=0.01)
    assert hidden(browser, "result")


def test_the_sentence_is_chosen_in_the_text_of_its_part(page, shelf):
    browser = page.browser
    ask(page)
    shown = answered(page)
    number = next(i for i, text in enumerate(shown, 1) if "*holds*" in text)
    browser.click(f"#sources li:nth-child({number}) button")
    browser.wait(lambda: not hidden(browser, "result"))
    page.settle()
    assert browser.text(".pane h2") == shown[number - 1].splitlines()[0]
    assert "its sentence is chosen" in browser.text("#opened")
    tokens = page.tokens("textContent")
    chosen = "".join(tokens[p] for p in page.chosen())
    assert " ".join(chosen.split()) == QUESTION
    # The text is the part's own.
    sources = shelf.client.post(f"{LIBRARIES}/inspected/find", json={"question": QUESTION})
    session = sources.json()["sources"][number - 1]["session"]
    part = shelf.client.get(f"/v1/lola/sessions/{session}/tokens").json()["tokens"]
    assert len(tokens) == len(part)
    in_view = browser.run(
        "const b = document.querySelector('.pane .chosen').getBoundingClientRect(),"
        "t = document.querySelector('.pane .text').getBoundingClientRect();"
        "return b.top >= t.top && b.bottom <= t.bottom"
    )
    assert in_view
    # A link asks again and shows the same.
    before = page.chosen()
    browser.click("#link")
    browser.wait(lambda: "link" in browser.text("#kept"))
    link = browser.run("return location.href")
    page.open(link, KEY)
    browser.keys(TAB)
    browser.wait(lambda: not hidden(browser, "result"))
    page.settle()
    assert page.chosen() == before and answered(page) == shown
    # Another question takes the text away, and so does a reading the answer.
    ask(page, "Who reads the window in the garden?")
    browser.wait(lambda: hidden(browser, "result"))
    answered(page)
    page.prompt("Two words")
    assert browser.text("#run") == "Show memory"
    page.show(timeline=False)
    assert hidden(browser, "told")


@pytest.mark.parametrize(
    ("size", "dark"), [((1280, 900), True), ((390, 844), False)], ids=["desktop", "phone"]
)
def test_it_is_accessible(page, size, dark):
    browser = page.browser
    browser.resize(*size, dark=dark)
    ask(page)
    answered(page)
    assert findings(browser) == []
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    # All by keyboard: behind the form come the buttons of the sources.
    browser.run("document.getElementById('detail').focus()")
    browser.keys(TAB)
    name = browser.run("return document.activeElement.getAttribute('aria-label')")
    assert name.startswith("Show it in its text: ")
    browser.keys("\ue007")
    browser.wait(lambda: not hidden(browser, "result"))
    page.settle()
    assert findings(browser) == []
    browser.resize(1280, 900)


class Answering(BaseHTTPRequestHandler):
    """The page, from a server that answers what `answers` says: by path, a status and a body."""

    answers: dict[str, tuple[int, str]]

    def do_GET(self):
        file = page_file(self.path)
        status, body = (200, file.body) if file else self.answers.get(self.path, (200, "{}"))
        self.send_response(status)
        self.send_header("Content-Type", file.kind if file else "application/json")
        self.end_headers()
        self.wfile.write(body if file else body.encode())

    do_POST = do_GET

    def log_message(self, *args):
        pass


NOT_FOUND = (404, '{"detail": "Not Found"}')
UNLISTED = (403, '{"error": {"message": "this server has no API keys"}}')
NONE_HERE = (501, '{"error": {"message": "libraries need prefix caching off"}}')
CUT = (200, 'data: {"choices": [{"delta": {"content": "It be"}}]}\n\n')
FAILED = (200, f"{CUT[1]}data: {json.dumps({'error': {'message': 'the engine ended'}})}\n\n")


@pytest.mark.parametrize(
    "listing, chat, at_first, in_the_end",
    [
        (NOT_FOUND, NOT_FOUND, "has no libraries", "has no libraries"),
        (UNLISTED, NONE_HERE, "does not list", "libraries need prefix caching off"),
        (UNLISTED, CUT, "does not list", "broke off"),
        (UNLISTED, FAILED, "does not list", "the engine ended"),
    ],
    ids=["without-routes", "without-libraries", "cut", "failed"],
)
def test_what_goes_wrong_is_told(browser, listing, chat, at_first, in_the_end):
    answers = {LIBRARIES: listing, f"{LIBRARIES}/some/chat": chat}
    handler = type("Handler", (Answering,), {"answers": answers})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = Page(browser)
        page.open(f"http://127.0.0.1:{server.server_port}{ROUTE}")
        choose(browser)
        browser.wait(lambda: at_first in browser.text("#status"))
        page.set("#library", "some")
        ask(page)
        browser.wait(lambda: in_the_end in browser.text("#status"))
        assert browser.run("return document.getElementById('status').className") == "error"
        # What came of an answer stays.
        assert hidden(browser, "told") == (chat[0] != 200)
        server.shutdown()


def test_the_page_asks_where_it_came_from(browser):
    """As from a server without a key, under a path that a proxy added."""
    asked = []

    class Proxy(Answering):
        def do_GET(self):
            asked_for, self.path = self.path, self.path.removeprefix("/proxy").split("?")[0]
            if page_file(self.path):
                super().do_GET()
            else:
                self.path = asked_for
                self.do_POST()

        def do_POST(self):
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_error(503)

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open(f"http://127.0.0.1:{server.server_port}/proxy/lola/inspector?x=1")
        browser.wait(lambda: "Service Unavailable" in browser.text("#status"))
        browser.type("#prompt", "x")
        browser.click("#run")
        browser.wait(lambda: len(asked) > 1)
        server.shutdown()
    assert asked == [("/proxy/v1/lola/info", None), ("/proxy/v1/lola/memory", None)]
