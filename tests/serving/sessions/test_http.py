"""Stored states over HTTP: words of vLLM's own, and what the answers say."""

import time

import pytest

from lola_vllm.serving.metrics import REFRESH_S
from tests.support.servers import KEY


def complete(server, prompt, headers=None, **body):
    answer = server.client.post(
        "/v1/completions",
        json={"model": "smollm2", "prompt": prompt, "max_tokens": 8, "temperature": 0, **body},
        headers={"Authorization": f"Bearer {KEY}", **(headers or {})},
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


TEXT = "The code of the vault is 73192. Remember this code, because you will need it later. "


def test_a_session_goes_on_by_its_header(lola_server):
    first = complete(lola_server, TEXT, {"X-Session-ID": "http-1"})
    told = first["kv_transfer_params"]["lola"]
    assert (told["session"], told["turn"], told["restored_tokens"]) == ("http-1", 1, 0)
    assert told["bytes"] > 0 and told["reason"]
    more = TEXT + first["choices"][0]["text"] + " And what is the code?"
    second = complete(lola_server, more, session_id="http-1")
    told = second["kv_transfer_params"]["lola"]
    assert (told["session"], told["turn"], told["reason"]) == ("http-1", 2, None)
    # The prompt's end at least: the answer's text may be other tokens.
    assert told["restored_tokens"] >= first["usage"]["prompt_tokens"]
    details = second["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == told["restored_tokens"]
    cold = complete(lola_server, more, kv_transfer_params={"lola": {"from": False, "save": False}})
    assert cold["choices"][0]["text"] == second["choices"][0]["text"]
    assert cold["kv_transfer_params"]["lola"]["reason"] == "not asked for"


@pytest.mark.parametrize(
    ("fields", "headers", "words"),
    [
        ({"kv_transfer_params": {"lola": {"save": "../x"}}}, {}, "lola.save = '../x'"),
        ({}, {"X-Session-ID": "a b"}, "session_id = 'a b'"),
        ({"session_id": "auto-1"}, {}, "given by the server"),
        ({"n": 2}, {"X-Session-ID": "http-3"}, "n = 2: a session goes on with one answer"),
    ],
)
@pytest.mark.parametrize("route", ["completions", "chat/completions", "responses"])
def test_a_request_whose_conversation_would_be_lost_is_refused(
    lola_server, route, fields, headers, words
):
    body = {"prompt": TEXT} if route == "completions" else {"input": TEXT}
    if route == "chat/completions":
        body = {"messages": [{"role": "user", "content": TEXT}]}
    if route == "responses" and ("n" in fields or "kv_transfer_params" in fields):
        pytest.skip("it has no such field")
    answer = lola_server.client.post(
        f"/v1/{route}", json={"model": "smollm2", **body, **fields}, headers=headers
    )
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_the_store_is_in_the_metrics(lola_server):
    complete(lola_server, TEXT, {"X-Session-ID": "http-2"})
    complete(lola_server, TEXT + "More.", {"X-Session-ID": "http-2"})
    time.sleep(REFRESH_S)
    found = {}
    for line in lola_server.client.get("/metrics").text.splitlines():
        if line.startswith("lola:session_"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0], "disk" in name] = float(value)
    assert found["lola:session_hits_total", False] >= 1
    assert found["lola:session_restored_tokens_total", False] >= 10
    assert found["lola:session_count", False] >= 1
    assert found["lola:session_bytes", False] <= found["lola:session_budget_bytes", False]
    assert found["lola:session_bytes", True] == 0
