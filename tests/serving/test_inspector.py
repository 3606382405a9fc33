"""The memory inspector in a real browser: what it shows is what the server answered."""

import http.server
import re
import signal
import subprocess
import threading

import httpx
import pytest

from lola_vllm.serving.inspector import inspector_page
from lola_vllm.serving.inspector.local import MEMORY, PAGE, Inspector, InspectorError
from lola_vllm.serving.protocol import MAX_BODY_BYTES
from tests.support.browser import chromium
from tests.support.servers import BIN, KEY

END = "\ue010"
RIGHT = "\ue014"
STORY = "The miller went to the river and the river went to the sea. " * 30
PROMPT = f"<b>The code</b> & the vault: 73192 🦙. {STORY}"


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def local(lola_server):
    """The page's address from `lola-vllm inspector`: no browser could open it with a key."""
    command = [str(BIN / "lola-vllm"), "inspector", "--url", lola_server.url, "--port", "0"]

    def interruptible():  # which it is not where tests run in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, text=True, preexec_fn=interruptible) as process:
        try:
            yield re.search(r"http://127\.0\.0\.1:\d+\S*", process.stdout.readline())[0]
        finally:
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(20) == 0
            finally:
                process.kill()


@pytest.fixture(scope="module")
def memory(lola_server):
    return lola_server.client.post("/v1/lola/memory", json={"prompt": PROMPT}).json()


@pytest.fixture(scope="module")
def shown(browser, local):
    """The page with the prompt's memory on it."""
    browser.open(local)
    browser.type("#key", KEY)
    # By script: a driver's keys cannot be any character.
    browser.run("document.getElementById('prompt').value = arguments[0]", PROMPT)
    browser.click("#run")
    browser.wait(lambda: browser.run("return document.querySelectorAll('#text .token').length"))
    return browser


def slide(browser, name, value):
    """Move a slider with the keyboard, as a person may."""
    browser.run(f"const s = document.getElementById('{name}'); s.value = 0; "
                "s.dispatchEvent(new Event('input'))")  # fmt: skip
    if value:
        browser.press(f"#{name}", RIGHT * value)


def held(browser):
    """Per token, the number that the page says holds it."""
    script = "return [...document.querySelectorAll('#text .token')].map((s) => +s.dataset.held)"
    return browser.run(script)


def counts(memory, layers, heads):
    found = [0] * memory["num_tokens"]
    for layer in layers:
        for head in heads:
            for position in memory["layers"][layer]["heads"][head]["positions"]:
                found[position] += 1
    return found


def test_the_page_needs_nothing_else(lola_server, local):
    answer = lola_server.client.get("/v1/lola/inspector")
    assert answer.headers["content-type"].startswith("text/html")
    page = answer.text
    assert page == httpx.get(local).text
    assert "style.css" not in page and "script.js" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)|@import|url\(", page)


def test_the_text_is_shown_as_text(shown, memory):
    tokens = shown.run(
        "return [...document.querySelectorAll('#text .token')].map((s) => s.textContent)"
    )
    assert tokens == memory["texts"] and "".join(tokens) == PROMPT
    assert shown.run("return document.querySelector('#text b')") is None
    assert shown.text("#status") == ""


def test_sinks_and_window_are_marked(shown, memory):
    script = "return document.querySelectorAll(`#text .${arguments[0]}`).length"
    assert shown.run(script, "sink") == memory["sinks"] == 4
    assert shown.run(script, "window") == memory["num_tokens"] - memory["window_start"]
    summary = shown.text("#summary")
    assert summary.startswith(f"{memory['num_tokens']} tokens")
    assert f"{memory['folded']} folded" in summary


@pytest.mark.parametrize("layer", [None, 0, 29])
@pytest.mark.parametrize("head", [None, 0, 2])
def test_sliders_choose_layer_and_head(shown, memory, layer, head):
    slide(shown, "layer", 0 if layer is None else layer + 1)
    slide(shown, "head", 0 if head is None else head + 1)
    assert shown.text("#layer-name") == ("all" if layer is None else str(layer))
    assert shown.text("#head-name") == ("all" if head is None else str(head))
    layers = range(30) if layer is None else [layer]
    heads = range(3) if head is None else [head]
    assert held(shown) == counts(memory, layers, heads)


def test_the_sliders_end_at_the_last_layer_and_head(shown):
    shown.press("#layer", END)
    shown.press("#head", END)
    assert (shown.text("#layer-name"), shown.text("#head-name")) == ("29", "2")


def test_colours_follow_the_heads_that_hold_a_token(shown):
    slide(shown, "layer", 0)
    slide(shown, "head", 0)
    script = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    by_count = dict(zip(held(shown), range(10**6), strict=False))  # one position of each count
    opacity = []
    for _, position in sorted(by_count.items()):
        colour = shown.run(script, f'#text [data-position="{position}"]')
        alpha = re.fullmatch(r"rgba?\((?:[\d.]+, ){2}[\d.]+(?:, ([\d.]+))?\)", colour)
        opacity.append(float(alpha[1] or 1))
    assert len(opacity) > 10 and opacity[0] == 0
    assert opacity == sorted(opacity) and len(set(opacity)) > 10


def test_hovering_tells_the_recall_error(shown, memory):
    slide(shown, "layer", 6)
    slide(shown, "head", 2)
    head = memory["layers"][5]["heads"][1]
    position, error = head["positions"][3], head["errors"][3]
    shown.hover(f'#text [data-position="{position}"]')
    tip = shown.text("#tip")
    assert f"position {position}, id {memory['tokens'][position]}" in tip
    assert "held by 1 of 1 heads" in tip
    told = float(re.search(r"recall error ([\d.]+)", tip)[1])
    assert told == pytest.approx(error, rel=1e-3)

    slide(shown, "head", 0)
    shown.hover("#text .window")
    assert "in the window" in shown.text("#tip")
    shown.hover("#text .sink")
    assert "a sink" in shown.text("#tip")
    folded = next(i for i in range(4, memory["window_start"]) if not held(shown)[i])
    shown.hover(f'#text [data-position="{folded}"]')
    assert "in the hidden state" in shown.text("#tip")
    shown.hover("h1")
    assert shown.run("return document.getElementById('tip').hidden")


def test_as_a_message(shown):
    shown.click("[name=kind][value=messages]")
    shown.click("#run")
    shown.wait(lambda: "<|im_start|>" in shown.text("#text"))
    assert shown.text("#text").rstrip().endswith("assistant")
    shown.click("[name=kind][value=prompt]")


def test_what_a_stored_session_remembers(shown, lola_server):
    append = {"prompt": f"{STORY} The code is 4711."}
    answer = lola_server.client.post("/v1/lola/sessions/shown/append", json=append)
    assert answer.status_code == 200, answer.text
    shown.click("[name=kind][value=session]")
    options = "return [...document.querySelectorAll('#session option')].map((o) => o.value)"
    shown.wait(lambda: "shown" in shown.run(options))
    assert "tokens)" in shown.text("#session")
    shown.run("document.getElementById('session').value = 'shown'")
    shown.click("#run")
    shown.wait(lambda: "4711" in shown.text("#text"))
    assert shown.text("#summary").startswith(f"{answer.json()['tokens']} tokens")
    shown.click("[name=kind][value=prompt]")
    assert not shown.run("return document.getElementById('session').checkVisibility()")


def test_errors_are_told(shown):
    shown.type("#prompt", "x")
    shown.run("document.getElementById('prompt').value = arguments[0]", STORY * 8)
    shown.click("#run")
    shown.wait(lambda: "from 1 to 2047" in shown.text("#status"))
    assert shown.run("return document.getElementById('result').hidden")
    shown.type("#key", "wrong")
    shown.click("#run")
    shown.wait(lambda: "wants its API key" in shown.text("#status"))
    assert KEY not in shown.run("return document.documentElement.outerHTML")


def test_the_local_page_passes_on_what_it_is_for_and_nothing_else(lola_server, local):
    base = local.removesuffix("/v1/lola/inspector")
    assert httpx.get(base).headers["location"] == "/v1/lola/inspector"
    memory = f"{base}/v1/lola/memory"
    assert httpx.post(memory, json={"prompt": "x"}).status_code == 401
    key = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(memory, json={"prompt": "x"}, headers=key, timeout=60).status_code == 200
    assert (
        httpx.post(memory, content="{}", headers=key).status_code == 400
    )  # any page may send this
    assert httpx.post(f"{base}/v1/completions", json={}, headers=key).status_code == 400
    assert httpx.get(f"{base}/v1/models", headers=key).status_code == 302
    assert httpx.get(f"{base}/v1/lola/sessions").status_code == 401
    assert "sessions" in httpx.get(f"{base}/v1/lola/sessions", headers=key).json()
    none = httpx.get(f"{base}/v1/lola/sessions/none/tokens", headers=key)
    assert none.status_code == 404 and "'none'" in none.text
    for path in ("sessions/none", "sessions/none/state", "info"):
        assert httpx.get(f"{base}/v1/lola/{path}", headers=key).status_code == 302


def test_a_server_that_is_not_there_and_an_address_that_is_none():
    with Inspector("http://127.0.0.1:9", 0) as inspector:
        status, answer = inspector.ask(b"{}", None)
    assert status == 502 and b"no answer from http://127.0.0.1:9" in answer
    with pytest.raises(InspectorError, match="--url = 'localhost:8000'"):
        Inspector("localhost:8000", 0)


@pytest.fixture
def inspector():
    with Inspector("http://127.0.0.1:9", 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LocalHost", "[::1]"])
def test_the_inspector_answers_to_its_own_names(inspector, name):
    base = f"http://127.0.0.1:{inspector.server_port}"
    host = {"Host": f"{name}:{inspector.server_port}"}
    assert "<html" in httpx.get(base + PAGE, headers=host).text
    assert httpx.post(base + MEMORY, json={}, headers=host).status_code == 502  # it asked


def test_the_inspector_says_why_it_passes_something_not_on(inspector):
    memory = f"http://127.0.0.1:{inspector.server_port}{MEMORY}"
    assert "only JSON" in httpx.post(memory, content="{}").json()["error"]["message"]
    answer = httpx.post(memory, json={"prompt": "a" * MAX_BODY_BYTES})
    assert answer.status_code == 413
    assert f"at most {MAX_BODY_BYTES} are read" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["evil.example:{}", "127.0.0.1.evil.example:{}", "localhost",
                                  "localhost:1", "10.0.0.1:{}", ""])  # fmt: skip
def test_the_inspector_answers_to_no_other(inspector, name):
    """A name of somebody's page that was made to point here (DNS rebinding)."""
    base = f"http://127.0.0.1:{inspector.server_port}"
    host = {"Host": name.format(inspector.server_port)}
    for answer in (
        httpx.get(base + PAGE, headers=host),
        httpx.get(base, headers=host),
        httpx.post(base + MEMORY, json={}, headers=host),
    ):
        assert answer.status_code == 421
        assert f"open http://127.0.0.1:{inspector.server_port}{PAGE}" in answer.text
        assert "<html" not in answer.text


def test_the_page_asks_where_it_came_from(browser):
    """As from a server without a key, under a path that a proxy added."""
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(inspector_page().encode())

        def do_POST(self):
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_error(503)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.errors()
        browser.open(f"http://127.0.0.1:{server.server_port}/proxy/v1/lola/inspector?x=1")
        assert browser.errors() == []
        browser.type("#prompt", "x")
        browser.click("#run")
        browser.wait(lambda: "Service Unavailable" in browser.text("#status"))
        server.shutdown()
    assert asked == [("/proxy/v1/lola/memory", None)]
