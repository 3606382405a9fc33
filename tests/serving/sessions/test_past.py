"""A session that recalls: a segment of its own text comes back for an answer."""

from typing import Any

import httpx
import pytest

from tests.serving.sessions.test_routes import BASE, ok, said
from tools.support.server_process import Server

PAST = "/v1/lola/libraries/library-past"
SEGMENT = 496  # of this server's --max-model-len
TEXT = (
    "The hidden state of the window is read by the model in the garden. " * 21
    + "A sparse cache holds the pairs of the largest score at the harbour. " * 23
)
GREEDY = {"temperature": 0, "max_tokens": 6}
QUESTION = "The hidden state of the window is read by the model"


def ask(server: Server, session: str, question: str = QUESTION, **more: Any) -> Any:
    body = {"prompt": question, "recall": "segments", **GREEDY, **more}
    return server.client.post(f"{BASE}/{session}/complete", json=body)


def parts_of(client: httpx.Client, session: str) -> list[dict[str, Any]]:
    shown, past = client.get(f"{BASE}/{session}"), client.get(PAST)
    if 404 in (shown.status_code, past.status_code):
        return []
    first = shown.json()["states"][0]["id"]  # which the session is known by
    documents = past.json()["documents"]
    return [part for one in documents if one["document"] == first for part in one["parts"]]


@pytest.fixture
def told(tiny, request):
    """A session that has read the text, of two segments and a rest."""
    name = f"past-{request.node.name.removeprefix('test_')[:40]}"
    ok(tiny.client.post(f"{BASE}/{name}/append", json={"prompt": TEXT}))
    assert 2 * SEGMENT < len(said(tiny, name)) < 3 * SEGMENT
    yield name
    tiny.client.delete(f"{BASE}/{name}")


def test_a_segment_comes_back_and_is_no_part_of_the_session(tiny, told):
    before = said(tiny, told)
    answer = ok(ask(tiny, told))
    lola = answer["kv_transfer_params"]["lola"]
    assert lola["recalled"]["first"] == 0 and lola["recalled"]["last"] == SEGMENT
    assert lola["recalled"]["sentence"] in TEXT and lola["recalled"]["score"] > 0
    after = said(tiny, told)
    assert after[: len(before)] == before and lola["tokens"] == len(after)
    count = answer["usage"]["completion_tokens"]
    question = ok(tiny.client.post("/tokenize", json={"model": "tiny", "prompt": QUESTION}))
    assert after[len(before) :][: question["count"]] == question["tokens"]
    assert len(after) == len(before) + question["count"] + count
    # Each segment is read once, and in no list of libraries or sessions.
    parts = parts_of(tiny.client, told)
    assert [part["tokens"] for part in parts] == [SEGMENT, SEGMENT]
    ok(ask(tiny, told))
    assert parts_of(tiny.client, told) == parts
    libraries = ok(tiny.client.get("/v1/lola/libraries"))["libraries"]
    assert "library-past" not in {one["library"] for one in libraries}
    sessions = ok(tiny.client.get(BASE))["sessions"]
    assert not [one for one in sessions if one["session"].startswith("library-")]
    assert parts_of(tiny.other, told) == []


def test_the_answer_is_that_of_the_present_and_the_segment(tiny, told):
    answer = ok(ask(tiny, told))
    (part, _) = parts_of(tiny.client, told)
    turn = ok(tiny.client.get(f"{BASE}/{told}"))["turn"]
    body = {"from": [f"{told}@{turn - 1}", part["session"]]}
    ok(tiny.client.post(f"{BASE}/{told}-by-hand/compose", json=body))
    body = {"prompt": QUESTION, **GREEDY}
    expected = ok(tiny.client.post(f"{BASE}/{told}-by-hand/complete", json=body))
    assert answer["choices"][0]["text"] == expected["choices"][0]["text"]
    tiny.client.delete(f"{BASE}/{told}-by-hand")


def test_a_chat_goes_on_after_what_came_back(tiny, told):
    message = {"messages": [{"role": "user", "content": QUESTION}], **GREEDY}
    answer = ok(tiny.client.post(f"{BASE}/{told}/chat", json={**message, "recall": "segments"}))
    assert answer["kv_transfer_params"]["lola"]["recalled"]["first"] == 0
    again = ok(tiny.client.post(f"{BASE}/{told}/chat", json=message))
    assert "recalled" not in again["kv_transfer_params"]["lola"]
    ids = said(tiny, told)
    body = {"model": "tiny", "tokens": ids}
    text = ok(tiny.client.post("/detokenize", json=body))["prompt"]
    content = answer["choices"][0]["message"]["content"]
    rest = text.removeprefix(TEXT)
    assert rest.count(f"user: {QUESTION}\n") == 2 and content in rest


def test_what_cannot_recall_is_refused(tiny, told):
    for body, words in (
        ({"recall": "all"}, "recall"),
        ({"prompt": [5, 6]}, "recall, library: prompt must be a text"),
    ):  # fmt: skip
        refused = ask(tiny, told, **body)
        assert refused.status_code == 400 and words in refused.json()["error"]["message"]
