"""Bodies of 10 MB: refused or read in a time that their size explains, and others are answered.

`docs/serving.md` and SECURITY.md state the bounds.
"""

import json
import threading
import time

import pytest

TEN_MB = 10 * 2**20
JSON = {"Content-Type": "application/json"}
PROMPT = {"model": "tiny", "prompt": "the window", "max_tokens": 2, "temperature": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
LONGEST_S = 20.0  # parsing takes a fraction of a second; the first fault took 288 s

# Forms whose parts are many, or one that is long.
FORMS = {
    "fields": lambda n: {f"{i:08}": 0 for i in range(n // 15)},
    "text": lambda n: "x" * n,
    "nested": lambda n: [[0]] * (n // 5),
}
# Where this package reads bodies of vLLM's routes.
PARAMS = {
    "completions": (PROMPT, lambda value: value),
    "chat/completions": (CHAT, lambda value: {"from": value}),
}
OURS = ("memory", "sessions/large/append", "sessions/large/chat", "sessions/large")


def others_wait(server, request):
    """Seconds of a request, and the longest that small ones of another client took meanwhile."""
    done, waited = threading.Event(), []

    def small():
        while not done.is_set():
            begin = time.monotonic()
            assert server.other.post("/v1/completions", json=PROMPT).status_code == 200
            waited.append(time.monotonic() - begin)

    thread = threading.Thread(target=small)
    thread.start()
    begin = time.monotonic()
    try:
        answer = request()
    finally:
        took = time.monotonic() - begin
        done.set()
        thread.join()
    return answer, took, max(waited)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", PARAMS)
def test_parameters_of_ten_megabytes_stops_nobody(tiny, route, form):
    fields, params = PARAMS[route]
    lola = {"kv_transfer_params": {"lola": params(FORMS[form](TEN_MB))}}
    body = json.dumps({**fields, **lola})
    assert len(body) > TEN_MB * 0.9
    answer, took, waited = others_wait(
        tiny, lambda: tiny.client.post(f"/v1/{route}", content=body, headers=JSON)
    )
    assert answer.status_code == 400, answer.text[:300]
    assert "kv_transfer_params" in answer.text and len(answer.text) < 2_000
    assert max(took, waited) < LONGEST_S


@pytest.mark.parametrize("path", OURS)
def test_our_routes_read_no_body_of_ten_megabytes(tiny, path):
    method = tiny.client.patch if path == "sessions/large" else tiny.client.post
    body = json.dumps({"prompt": "x" * TEN_MB})
    answer, took, waited = others_wait(
        tiny, lambda: method(f"/v1/lola/{path}", content=body, headers=JSON)
    )
    assert answer.status_code == 413 and "which are read at most" in answer.text
    assert max(took, waited) < LONGEST_S


@pytest.mark.parametrize("text", ["\n" * 900_000, "a\n" * 450_000], ids=["line ends", "lines"])
def test_a_long_text_of_short_lines_stops_nobody(tiny, text):
    """Each line end was counted apart, and a run of them was searched again for each."""
    documents = "libraries/large/documents"
    small = "A sparse cache holds the pairs of the largest score at the harbour. " * 4
    if tiny.client.get("/v1/lola/libraries/large").status_code == 404:
        added = {"document": "small", "text": small}
        assert tiny.client.post(f"/v1/lola/{documents}", json=added).status_code == 200
    said = {"messages": [{"role": "user", "content": f"{text}x"}], "max_tokens": 2}
    bodies = {
        "sessions/lines/append": {"prompt": text},
        "sessions/lines/chat": said,
        "memory": {"prompt": text},
        "libraries/large/chat": said,
    }
    if not text.strip():  # there is nothing to read in it
        bodies[documents] = {"document": "lines", "text": text}
    for path, body in bodies.items():
        answer, took, waited = others_wait(
            tiny, lambda path=path, body=body: tiny.client.post(f"/v1/lola/{path}", json=body)
        )
        assert answer.status_code == 400, (path, answer.text[:300])
        assert max(took, waited) < LONGEST_S, path


def test_a_header_of_megabytes_is_refused(tiny):
    answer = tiny.client.post(
        "/v1/completions", json=PROMPT, headers={"X-Session-ID": "x" * 60_000}
    )
    assert answer.status_code == 400 and len(answer.text) < 2_000
    found = tiny.client.get("/v1/lola/sessions/" + "x" * 60_000)
    assert found.status_code == 400 and len(found.text) < 2_000
