"""`lola-vllm inspector`: the page on this machine, which passes on what it is for and no more."""

import http.server
import re
import signal
import subprocess
import threading

import httpx
import pytest

from lola_vllm.serving.inspector import page_file
from lola_vllm.serving.inspector.local import COMPLETIONS, MEMORY, PAGE, Inspector, InspectorError
from lola_vllm.serving.protocol import MAX_BODY_BYTES
from tests.support.browser import chromium
from tests.support.servers import KEY
from tools.support.server_process import BIN


@pytest.fixture(scope="module")
def local(lola_server):
    """The page's address from `lola-vllm inspector`."""
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


def test_the_local_page_passes_on_what_it_is_for_and_nothing_else(lola_server, local):
    base = local.removesuffix(PAGE)
    assert httpx.get(base).headers["location"] == PAGE
    assert '<nav hidden id="links"' in httpx.get(local).text  # what it leads to is not here
    memory = f"{base}/v1/lola/memory"
    assert httpx.post(memory, json={"prompt": "x"}).status_code == 401
    key = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(memory, json={"prompt": "x"}, headers=key, timeout=60).status_code == 200
    assert (
        httpx.post(memory, content="{}", headers=key).status_code == 400
    )  # any page may send this
    body = {"prompt": "The sky is", "max_tokens": 3, "stream": True, "model": "smollm2"}
    with httpx.stream("POST", base + COMPLETIONS, json=body, headers=key, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line for line in answer.iter_lines() if line]
    assert len(events) >= 4 and events[-1] == "data: [DONE]"
    assert httpx.post(f"{base}/v1/chat/completions", json={}, headers=key).status_code == 400
    assert httpx.get(f"{base}/v1/lola/info").status_code == 401
    assert httpx.get(f"{base}/v1/lola/info", headers=key).json()["model"] == "smollm2"
    assert httpx.get(f"{base}/v1/models", headers=key).status_code == 302
    assert httpx.get(f"{base}/v1/lola/sessions").status_code == 401
    assert "sessions" in httpx.get(f"{base}/v1/lola/sessions", headers=key).json()
    none = httpx.get(f"{base}/v1/lola/sessions/none/tokens", headers=key)
    assert none.status_code == 404 and "'none'" in none.text
    turn = httpx.get(f"{base}/v1/lola/sessions/none@3/tokens", headers=key)
    assert turn.status_code == 404 and "'none'" in turn.text
    for path in ("sessions/none", "sessions/none/state", "sessions/..%2f/tokens"):
        assert httpx.get(f"{base}/v1/lola/{path}", headers=key).status_code == 302


def test_a_server_that_is_not_there_and_an_address_that_is_none():
    with Inspector("http://127.0.0.1:9", 0) as inspector, inspector.ask(b"{}", None) as answer:
        assert answer.status == 502
        assert b"no answer from http://127.0.0.1:9" in b"".join(answer.parts)
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


def test_the_page_asks_where_it_came_from():
    """As from a server without a key, under a path that a proxy added."""
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.removeprefix("/proxy").split("?")[0]
            file = page_file(path)
            if file is None:
                self.do_POST()
                return
            self.send_response(200)
            self.send_header("Content-Type", file.kind)
            self.end_headers()
            self.wfile.write(file.body)

        def do_POST(self):
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_error(503)

        def log_message(self, *args):
            pass

    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server,
        chromium() as browser,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open(f"http://127.0.0.1:{server.server_port}/proxy/lola/inspector?x=1")
        browser.wait(lambda: "Service Unavailable" in browser.text("#status"))
        browser.type("#prompt", "x")
        browser.click("#run")
        browser.wait(lambda: len(asked) > 1)
        server.shutdown()
    assert asked == [("/proxy/v1/lola/info", None), ("/proxy/v1/lola/memory", None)]
