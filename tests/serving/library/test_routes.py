"""Libraries over HTTP: documents are read in parts, found, composed, answered from, and deleted."""

import io
import re
import time
from typing import Any

import pytest

from lola_vllm.command import cli
from tests.serving.sessions.test_routes import events, ok, refused, user
from tests.support.servers import KEY
from tools.support.server_process import Server

BASE = "/v1/lola/libraries"
# Words of the tokenizer's own texts, so that a part has few tokens.
GARDEN = "The hidden state of the window is read by the model in the garden. " * 40
HARBOUR = "A sparse cache holds the pairs of the largest score at the harbour. " * 12
GREEDY = {"temperature": 0, "max_tokens": 6}


def add(server: Server, library: str, document: str, text: str, **body: Any) -> Any:
    body = {"document": document, "text": text, "part_tokens": 240, **body}
    return server.client.post(f"{BASE}/{library}/documents", json=body)


@pytest.fixture(scope="module")
def shelf(tiny):
    """The library `shelf`, of two documents."""
    ok(add(tiny, "shelf", "garden.txt", GARDEN))
    ok(add(tiny, "shelf", "a path/harbour.txt", HARBOUR, ttl=3000))
    return tiny


def test_documents_are_read_in_parts(shelf):
    found = ok(shelf.client.get(f"{BASE}/shelf"))
    garden, harbour = sorted(found["documents"], key=lambda one: -one["tokens"])
    assert (garden["document"], harbour["document"]) == ("garden.txt", "a path/harbour.txt")
    assert garden["complete"] and len(garden["parts"]) > 1 and garden["expires"] is None
    assert all(part["tokens"] <= 240 for part in garden["parts"])
    assert [part["part"] for part in garden["parts"]] == [*range(1, len(garden["parts"]) + 1)]
    assert harbour["expires"] > harbour["created"] + 2900
    (summary,) = (
        one for one in ok(shelf.client.get(BASE))["libraries"] if one["library"] == "shelf"
    )
    assert summary["documents"] == 2 and summary["parts"] == found["parts"]
    # They are sessions, which nobody sees among their own, or writes to.
    name = garden["parts"][0]["session"]
    sessions = ok(shelf.client.get("/v1/lola/sessions"))["sessions"]
    assert name not in {one["session"] for one in sessions}
    assert ok(shelf.client.get(f"/v1/lola/sessions/{name}/tokens"))["tokens"]
    body = {"model": "tiny", "prompt": "x", "kv_transfer_params": {"lola": {"save": name}}}
    refused(shelf.client.post("/v1/completions", json=body), 400, "are given by the server")


def test_an_answer_names_its_sources(shelf):
    question = {"messages": user("What is at the harbour?"), **GREEDY}
    answer = ok(shelf.client.post(f"{BASE}/shelf/chat", json=question))
    sources = answer["sources"]
    assert len(sources) == 3 and answer["choices"][0]["message"]["content"]
    assert sources[0]["document"] == "a path/harbour.txt"  # by its words
    for source in sources:
        text = " ".join((GARDEN if source["document"] == "garden.txt" else HARBOUR).split())
        assert source["sentence"] and source["sentence"] in source["passage"]
        assert len(source["passage"]) > len(source["sentence"]) and source["passage"] in text
        assert 0 <= source["share"] <= 1
    assert any(source["score"] > 0 for source in sources)
    told = answer["kv_transfer_params"]["lola"]
    assert told["restored_tokens"] == sources[0]["tokens"] and told["reason"] is None
    # The answer is the same as a stream.
    with shelf.client.stream(
        "POST", f"{BASE}/shelf/chat", json={**question, "stream": True}
    ) as stream:
        first, *words, last = events(stream)
    assert first["sources"] == last["sources"] == sources
    assert last["kv_transfer_params"]["lola"]["reason"] is None
    said = "".join(w["choices"][0]["delta"].get("content") or "" for w in words if w["choices"])
    assert said == answer["choices"][0]["message"]["content"]
    body = {"question": "What is at the harbour?", "top": 2}
    found = ok(shelf.client.post(f"{BASE}/shelf/find", json=body))
    assert [one["session"] for one in found["sources"]] == [one["session"] for one in sources[:2]]


def test_a_session_goes_on_from_an_answer(shelf):
    body = {"prompt": "The harbour is", "session": "on", **GREEDY}
    first = ok(shelf.client.post(f"{BASE}/shelf/complete", json=body))
    source = first["sources"][0]
    shown = ok(shelf.client.get("/v1/lola/sessions/on"))
    assert shown["made_of"] == [f"{source['session']}@1"]
    refused(shelf.client.post(f"{BASE}/shelf/complete", json=body), 409, "'on'")
    body = {"prompt": " so", **GREEDY}
    more = ok(shelf.client.post("/v1/lola/sessions/on/complete", json=body))
    assert more["kv_transfer_params"]["lola"]["restored_tokens"] >= source["tokens"]


def test_a_terminal_goes_on_from_an_answer(shelf, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    words = ["library", "ask", "shelf", "What is at the harbour?", "--session", "walk"]
    assert cli.main([*words, "--url", shelf.url, "--max-tokens", "4"]) == 0
    assert len(re.findall(r"^\[\d\] .*\(\d+%\)$", capsys.readouterr().out, re.M)) == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("And then?\n"))
    assert cli.main(["chat", shelf.url, "--session", "walk", "--max-tokens", "4"]) == 0
    assert re.search(r"turn 3: [\d,]+ tokens restored, ", capsys.readouterr().err)
    shown = ok(shelf.client.get("/v1/lola/sessions/walk"))
    assert shown["turns"] == [1, 2, 3] and shown["made_of"]
    body = {"messages": user("So?"), "library": "shelf", **GREEDY}
    asked = ok(shelf.client.post("/v1/lola/sessions/walk/chat", json=body))
    assert len(asked["sources"]) == 3 and asked["kv_transfer_params"]["lola"]["turn"] == 4
    where = "/v1/lola/sessions/nobody/chat"
    refused(shelf.client.post(where, json=body), 400, "begin it with POST")
    body["recall"] = "segments"
    refused(shelf.client.post("/v1/lola/sessions/walk/chat", json=body), 400, "one of them")


def test_owners_have_libraries_of_their_own(shelf):
    find = {"question": "What?"}
    refused(shelf.other.get(f"{BASE}/shelf"), 404, "no library 'shelf'")
    refused(shelf.other.post(f"{BASE}/shelf/find", json=find), 404, "no library 'shelf'")
    assert ok(shelf.other.get(BASE))["libraries"] == []


def test_a_document_is_replaced_and_deleted_for_good(tiny):
    ok(add(tiny, "gone", "one", HARBOUR))
    refused(add(tiny, "gone", "one", GARDEN), 409, '"replace": true')
    body = {"document": "one", "text": GARDEN, "part_tokens": 240, "replace": True}
    where = f"{BASE}/gone/documents"
    with tiny.client.stream("POST", where, json={**body, "stream": True}) as stream:
        *parts, document = events(stream)
    assert [part["part"] for part in parts] == [*range(1, len(parts) + 1)]
    assert document["complete"] and len(document["parts"]) == len(parts) > 1
    ok(add(tiny, "gone", "two", HARBOUR))
    ask = {"prompt": "The harbour is", **GREEDY}
    answer = ok(tiny.client.post(f"{BASE}/gone/complete", json=ask))
    ok(tiny.client.post(f"{BASE}/gone/complete", json={**ask, "session": "kept"}))
    used = answer["sources"][0]["document"]
    sessions = [source["session"] for source in answer["sources"]]
    gone = ok(tiny.client.delete(f"{BASE}/gone/documents/{used}"))
    assert gone["composed"] == ["kept"] and gone["deleted"] >= 1
    left = {one["document"] for one in ok(tiny.client.get(f"{BASE}/gone"))["documents"]}
    assert left == {"one", "two"} - {used}
    ok(tiny.client.delete(f"{BASE}/gone"))
    refused(tiny.client.get(f"{BASE}/gone"), 404, "no library 'gone'")
    for session in sessions:
        assert tiny.client.get(f"/v1/lola/sessions/{session}").status_code == 404
    assert ok(tiny.client.get("/v1/lola/sessions/kept"))["made_of"]


def sizes(server: Server, library: str, document: str = "one") -> list[int]:
    """Tokens of the parts of a document, which is whole."""
    found = ok(server.client.get(f"{BASE}/{library}"))["documents"]
    (one,) = (one for one in found if one["document"] == document)
    assert one["complete"]
    return [part["tokens"] for part in one["parts"]]


# So long that a fast machine still adds it when the next request comes.
LONG = {"document": "one", "text": GARDEN * 60, "part_tokens": 240, "replace": True, "stream": True}


def test_a_document_stays_until_the_new_one_is_whole(tiny):
    ok(add(tiny, "anew", "one", HARBOUR))
    before = sizes(tiny, "anew")
    where = f"{BASE}/anew/documents"
    with tiny.client.stream("POST", where, json=LONG) as stream:
        lines = stream.iter_lines()  # httpx closes the connection with it
        next(lines)
        refused(add(tiny, "anew", "one", HARBOUR, replace=True), 409, "is adding it to 'anew'")
        assert sizes(tiny, "anew") == before  # and the client leaves
    deadline = time.monotonic() + 60
    answer = add(tiny, "anew", "one", GARDEN)
    while "is adding it" in answer.text and time.monotonic() < deadline:
        time.sleep(0.05)
        answer = add(tiny, "anew", "one", GARDEN)
    refused(answer, 409, '"replace": true')
    assert sizes(tiny, "anew") == before
    with tiny.client.stream("POST", where, json=LONG) as stream:
        assert "[DONE]" in stream.read().decode()
    assert len(sizes(tiny, "anew")) > len(before)


def test_a_refused_question_leaves_no_session(shelf):
    ask = {"prompt": "The harbour is", "session": "refused", **GREEDY}
    chat = {"messages": user("Where?"), "session": "refused", **GREEDY}
    too_long = "What is at the harbour? " * 400
    for library, route, body, status in (
        ("shelf", "complete", {**ask, "model": "none"}, 404),
        ("shelf", "complete", {**ask, "prompt": too_long, "question": "What?"}, 400),
        ("shelf", "complete", {**ask, "temperature": -1}, 400),
        ("nowhere", "complete", ask, 404),
        ("shelf", "chat", {**chat, "model": "none"}, 404),
        ("shelf", "chat", {**chat, "messages": user(too_long),
                           "question": "What?"}, 400),
        ("shelf", "chat", {**chat, "stream": True, "model": "none"}, 404),
    ):  # fmt: skip
        answer = shelf.client.post(f"{BASE}/{library}/{route}", json=body)
        assert answer.status_code == status, (route, body, answer.text)
        assert shelf.client.get("/v1/lola/sessions/refused").status_code == 404, (route, body)
    ok(shelf.client.post(f"{BASE}/shelf/complete", json=ask))
    refused(shelf.client.post(f"{BASE}/shelf/complete", json={**ask, "model": "none"}), 409, "'ref")
    assert shelf.client.get("/v1/lola/sessions/refused").status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"document": "x\ny"}, "control characters"),
        ({"part_tokens": 9000}, "part_tokens = 9000"),
        ({"titel": "x"}, "titel"),
    ],
)
def test_documents_with_faults_are_refused(tiny, body, words):
    given = {"document": "d", "text": HARBOUR} | body
    refused(tiny.client.post(f"{BASE}/wrong/documents", json=given), 400, words)
    refused(tiny.client.get(f"{BASE}/wrong"), 404, "no library 'wrong'")


def test_a_server_that_composes_nothing_says_so(lola_server):
    client, document = lola_server.client, {"document": "d", "text": HARBOUR}
    lola = {"from": ["one", "two"]}
    answers = [
        client.post(f"{BASE}/x/documents", json=document),
        client.post("/v1/lola/sessions/both/compose", json=lola),
    ]
    for answer in answers:
        refused(answer, 501, "--enable-prefix-caching")
    assert len({answer.json()["error"]["message"] for answer in answers}) == 1
