"""Sessions over HTTP: what is managed, and that going on with one equals sending all of it."""

import json
import re
import time
import uuid

import httpx
import pytest

from lola_vllm.core import cpu
from lola_vllm.serving.metrics import REFRESH_S
from lola_vllm.serving.sessions.owners import NO_KEY
from tests.serving.test_lola_routes import complete

TEXT = "the hidden state of the window is read by the model "
BASE = "/v1/lola/sessions"
COLD = {"kv_transfer_params": {"lola": {"from": False, "save": False}}}


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, status, words):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status and words in error["message"], error


def post(server, path, **body):
    return server.client.post(f"{BASE}/{path}", json=body)


def said(server, session):
    return ok(server.client.get(f"{BASE}/{session}/tokens"))["tokens"]


def told(answer):
    return answer["kv_transfer_params"]["lola"]


def user(text):
    return [{"role": "user", "content": text}]


GREEDY = {"temperature": 0, "max_tokens": 7, "return_token_ids": True}


def cold(server, tokens):
    """What the model answers to these tokens when it computes all of them."""
    salt = uuid.uuid4().hex  # vLLM's own prefix cache would answer too
    body = {"model": "tiny", "prompt": tokens, "cache_salt": salt, **GREEDY, **COLD}
    answer = ok(server.client.post("/v1/completions", json=body))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    return answer["choices"][0]["token_ids"]


def test_a_session_read_in_parts_answers_as_one_text(tiny):
    first = ok(post(tiny, "parts/append", prompt=TEXT * 6))
    assert (first["turn"], first["restored_tokens"]) == (1, 0)
    assert first["tokens"] == first["new_tokens"] and first["unsaved"] is None
    ids = said(tiny, "parts")
    second = ok(post(tiny, "parts/append", prompt=[5, 6, 7], turn=1))
    assert (second["turn"], second["restored_tokens"], second["new_tokens"]) == (2, len(ids), 3)
    assert said(tiny, "parts") == [*ids, 5, 6, 7]
    answer = ok(post(tiny, "parts/complete", prompt="and then", **GREEDY))
    prompt = answer["choices"][0]["prompt_token_ids"]
    assert prompt[: len(ids) + 3] == [*ids, 5, 6, 7]
    assert told(answer)["restored_tokens"] == len(ids) + 3 and told(answer)["reason"] is None
    words = answer["choices"][0]["token_ids"]
    assert words == cold(tiny, prompt)
    assert said(tiny, "parts") == prompt + words
    # The last word was sampled and not read: the next turn reads it first.
    more = ok(post(tiny, "parts/complete", prompt=[9], **GREEDY))
    assert more["choices"][0]["prompt_token_ids"] == [*prompt, *words, 9]
    assert told(more)["restored_tokens"] == len(prompt + words) - 1
    assert more["choices"][0]["token_ids"] == cold(tiny, [*prompt, *words, 9])


def test_an_answer_of_one_word_is_part_of_the_session(tiny):
    answer = ok(post(tiny, "short/chat", messages=user("One?"), **GREEDY | {"max_tokens": 1}))
    whole = answer["prompt_token_ids"] + answer["choices"][0]["token_ids"]
    assert said(tiny, "short") == whole
    # It is the assistant's turn that the next message ends.
    after = ok(post(tiny, "short/chat", messages=user("Two?"), **GREEDY))["prompt_token_ids"]
    body = {"model": "tiny", "prompt": "\nuser: Two?\nassistant: ", "add_special_tokens": False}
    assert after == whole + ok(tiny.client.post("/tokenize", json=body))["tokens"]


def events(lines):
    return [json.loads(line[6:]) for line in lines.iter_lines() if line.startswith("data: {")]


@pytest.mark.parametrize(
    ("verb", "new"), [("chat", {"messages": user("Hm?")}), ("complete", {"prompt": " and"})]
)
def test_streams_tell_what_was_restored(tiny, verb, new):
    ok(post(tiny, f"stream-{verb}/append", prompt=TEXT * 2))
    ok(post(tiny, f"stream-{verb}/fork", to=f"plain-{verb}"))
    plain = ok(post(tiny, f"plain-{verb}/{verb}", **new, **GREEDY))
    body = new | GREEDY | {"stream": True}
    with tiny.client.stream("POST", f"{BASE}/stream-{verb}/{verb}", json=body) as lines:
        assert lines.headers["content-type"].startswith("text/event-stream")
        found = events(lines)
    words = [i for e in found for c in e["choices"] for i in c.get("token_ids") or ()]
    assert words == plain["choices"][0]["token_ids"]
    assert found[-1]["choices"] == []
    lola = told(found[-1])
    assert lola["restored_tokens"] == told(plain)["restored_tokens"] > 20
    assert (lola["session"], lola["turn"]) == (f"stream-{verb}", 2)


def test_one_request_at_a_time_writes_a_session_until_its_client_leaves(tiny):
    body = {"messages": user("Go on."), "max_tokens": 1500, "ignore_eos": True, "stream": True}
    for attempt in range(8):  # on a busy machine the long answer may end before
        name = f"left{attempt}"
        ok(post(tiny, f"{name}/append", prompt=TEXT))
        with tiny.client.stream("POST", f"{BASE}/{name}/chat", json=body) as lines:
            words = lines.iter_lines()  # httpx closes the connection with it
            next(words)
            second = post(tiny, f"{name}/append", prompt="x")
            ok(post(tiny, f"{name}/fork", to=f"meanwhile{attempt}"))
        if second.is_error:
            break
    refused(second, 409, "being written by another request")
    deadline = time.monotonic() + 30
    while (answer := post(tiny, f"{name}/chat", messages=user("Still there?"), **GREEDY)).is_error:
        assert answer.status_code == 409 and time.monotonic() < deadline, answer.text
        time.sleep(0.1)
    assert answer.json()["choices"][0]["token_ids"] == cold(tiny, answer.json()["prompt_token_ids"])


def test_list_show_fork_rename_pin_and_delete(tiny):
    for turn in range(3):
        ok(post(tiny, "agent/append", prompt=f"{turn} {TEXT}"))
    listed = ok(tiny.client.get(BASE))["sessions"]
    assert listed[0]["session"] == "agent" and listed[0]["turn"] == 3
    ids = said(tiny, "agent")
    forked = ok(post(tiny, "agent@2/fork", to="plan-b"))
    assert forked["turn"] == 1 and said(tiny, "plan-b") == said(tiny, "agent@2")
    refused(post(tiny, "agent/fork", to="plan-b"), 409, "there is such a session already")
    on = ok(post(tiny, "agent@1/append", prompt="elsewhere"))
    assert on["turn"] == 4 and on["restored_tokens"] == len(said(tiny, "agent@1"))
    assert said(tiny, "agent@3") == ids != said(tiny, "agent")

    changed = ok(tiny.client.patch(f"{BASE}/plan-b", json={"session": "plan-c"}))
    assert changed["session"] == "plan-c"
    refused(tiny.client.get(f"{BASE}/plan-b"), 404, "'plan-b'")
    refused(tiny.client.patch(f"{BASE}/plan-c", json={"session": "agent"}), 409, "already")
    assert ok(tiny.client.delete(f"{BASE}/agent@2"))["deleted"] == 1
    refused(tiny.client.get(f"{BASE}/agent@2/tokens"), 404, "turn 2")
    ok(tiny.client.delete(f"{BASE}/agent"))
    refused(tiny.client.delete(f"{BASE}/agent"), 404, "nothing is stored under 'agent'")


def test_a_state_is_taken_away_and_brought_back(tiny, tmp_path):
    ok(post(tiny, "home/append", prompt=TEXT * 3))
    deadline = time.monotonic() + 20
    while (file := tiny.client.get(f"{BASE}/home/state")).status_code == 503:  # not yet written
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert file.status_code == 200 and file.headers["x-lola-ranks"] == "1"
    refused(tiny.client.get(f"{BASE}/home/state?rank=1"), 400, "rank = 1")
    put = lambda name, content: tiny.client.put(f"{BASE}/{name}/state", content=content)  # noqa: E731
    assert ok(put("abroad", file.content))["tokens"] == len(said(tiny, "home"))
    assert said(tiny, "abroad") == said(tiny, "home")
    answer = ok(post(tiny, "abroad/complete", prompt=[7], **GREEDY))
    assert told(answer)["restored_tokens"] == len(said(tiny, "home"))
    assert answer["choices"][0]["token_ids"] == cold(tiny, [*said(tiny, "home"), 7])
    refused(put("abroad", file.content), 409, "already")
    middle = len(file.content) // 2
    flipped = bytearray(file.content)
    flipped[middle] ^= 1
    refused(put("damaged", bytes(flipped)), 400, "checksum")
    refused(put("short", file.content[:middle]), 400, "")
    refused(put("large", bytes(4 * 2**20)), 413, "which no state of this model has")
    # The other key's owner may bring it too: whoever has the file has the state.
    assert ok(tiny.other.put(f"{BASE}/gift/state", content=file.content))["turn"] == 1


def test_keys_are_told_apart_on_every_route(tiny):
    ok(post(tiny, "mine/append", prompt=TEXT * 4))
    ids = said(tiny, "mine")
    for path in ("mine", "mine/tokens", "mine/state"):
        refused(tiny.other.get(f"{BASE}/{path}"), 404, "'mine'")
    assert "mine" not in [s["session"] for s in ok(tiny.other.get(BASE))["sessions"]]
    refused(tiny.other.delete(f"{BASE}/mine"), 404, "'mine'")
    refused(tiny.other.post(f"{BASE}/mine/fork", json={"to": "stolen"}), 404, "'mine'")

    # Each with a text of its own, because the second owner has cached prefixes too.
    for number, (path, named) in enumerate(
        (("/v1/completions", False), ("/v1/completions", True), ("/v1/chat/completions", False))
    ):
        text, body = f"{number} {TEXT * 40}", {"model": "tiny", "max_tokens": 2, "temperature": 0}
        body |= {"messages": user(text)} if "chat" in path else {"prompt": text}
        ok(tiny.client.post(path, json=body, headers={"X-Session-ID": f"mine-{number}"}))
        if named:
            body["kv_transfer_params"] = {"lola": {"from": f"mine-{number}"}}
        if "chat" in path:
            body["messages"] += [{"role": "assistant", "content": "x"}, *user("y")]
        else:
            body["prompt"] += " and"
        theirs = ok(tiny.other.post(path, json=body))
        assert told(theirs)["restored_tokens"] == 0 and told(theirs)["reason"]
        assert theirs["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        again = ok(tiny.client.post(path, json=body))
        assert theirs["choices"] == again["choices"]
        # The first may have read the prefix that it shares with the prompt before.
        again = ok(tiny.client.post(path, json=body))
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 40
        assert theirs["choices"] == again["choices"]
    # The same name is another session.
    assert ok(tiny.other.post(f"{BASE}/mine/append", json={"prompt": "x"}))["turn"] == 1
    assert said(tiny, "mine") == ids


def test_a_request_without_a_key_has_no_stored_states(tiny):
    """vLLM answers /invocations without a key."""
    ok(post(tiny, "guarded/append", prompt=TEXT * 4))
    ids = said(tiny, "guarded")
    params = {"from": "guarded", "save": "guarded"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Session-ID": "guarded"}):
        body = {"model": "tiny", "prompt": [*ids, 5], "max_tokens": 2, "temperature": 0}
        if "X-Session-ID" not in headers:
            body["kv_transfer_params"] = {"lola": params}
        answer = ok(httpx.post(f"{tiny.url}/invocations", json=body, headers=headers, timeout=60))
        if not headers:  # vLLM's prefix cache has what others said without a key
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        lola = told(answer)
        assert (lola["restored_tokens"], lola["turn"], lola["reason"]) == (0, None, NO_KEY)
        assert lola["unsaved"] == NO_KEY
    assert said(tiny, "guarded") == ids
    # With the key it is a route as the others.
    again = ok(tiny.client.post("/invocations", json=body))
    assert told(again)["restored_tokens"] == len(ids)


BAD = {
    "name": ("a b/append", {"prompt": "x"}, 400, "session = 'a b'"),
    "long-name": (f"{'a' * 65}/chat", {"messages": user("x")}, 400, "1 to 64"),
    "turn-of-nothing": ("none@2/append", {"prompt": "x"}, 404, "'none'"),
    "expected-tokens": ("none/append", {"prompt": "x", "tokens": 3}, 404, "'none'"),
    "fork-to-no-name": ("none/fork", {"to": "../x"}, 400, "to = '../x'"),
    "nothing-to-read": ("none/append", {}, 400, "give one of 'prompt'"),
    "unknown-field": ("none/append", {"prompt": "x", "tll": 3}, 400, "nearest valid name: 'ttl'"),
    "no-token": ("none/append", {"prompt": [99999]}, 400, "token id 99999"),
    "too-long": ("none/append", {"prompt": [5] * 2048}, 400, "from 1 to 2047"),
    "two-answers": ("none/chat", {"messages": user("x"), "n": 2}, 400, "n = 2"),
    "stop": ("none/complete", {"prompt": "x", "stop": ["."]}, 400, "stop_token_ids"),
    "beams": ("none/complete", {"prompt": "x", "use_beam_search": True}, 400, "use_beam_search"),
    "model": ("none/chat", {"messages": user("x"), "model": "y"}, 404, "`y`"),
}


@pytest.mark.parametrize(("path", "body", "status", "words"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused_and_store_nothing(tiny, path, body, status, words):
    refused(post(tiny, path, **body), status, words)
    assert "none" not in [one["session"] for one in ok(tiny.client.get(BASE))["sessions"]]


def test_a_session_that_has_become_too_long_says_so(tiny):
    ok(post(tiny, "full/append", prompt=[5] * 2000))
    refused(post(tiny, "full/append", prompt=[5] * 48), 400, "2048 tokens")
    refused(post(tiny, "full/chat", messages=user(TEXT * 9)), 400, "--max-model-len")
    refused(post(tiny, "full/append", prompt="x", turn=0), 409, "there is a session 'full'")
    refused(post(tiny, "full/append", prompt="x", turn=7), 409, "is at turn 1")
    refused(post(tiny, "full/append", prompt="x", turn=1, tokens=1999), 409, "covers 2000")
    ok(post(tiny, "full/append", prompt="x", turn=1, tokens=2000))


QUESTIONS = [
    "What is the capital of France?",
    "And of Italy? Answer in one sentence.",
    "Which of the two has more people?",
]


# How far log-probabilities may be apart. bfloat16 rounds a product of 7 rows otherwise than one of
# 90: they differ by up to 0.13 here.
CLOSE = 1e-3 if cpu.preferred_dtype({}) == "float32" else 0.25


def assert_same_words(mine, theirs):
    """The same tokens, or up to one where the two likeliest are closer than rounding."""
    ours, whole = (choice["logprobs"]["content"] for choice in (mine, theirs))
    for a, b in zip(ours, whole, strict=False):
        assert abs(a["top_logprobs"][0]["logprob"] - b["top_logprobs"][0]["logprob"]) < CLOSE, (
            a,
            b,
        )
        if a["token"] != b["token"]:
            first, second = (token["logprob"] for token in b["top_logprobs"][:2])
            assert first - second < CLOSE, (a, b)
            return
    assert mine["message"]["content"] == theirs["message"]["content"]
    assert mine["finish_reason"] == theirs["finish_reason"]


def test_a_chat_by_its_new_messages_equals_the_whole_chat_sent_again(lola_server):
    """The demo model with a real template, whose answers end by themselves or are cut."""
    common = {"temperature": 0, "max_tokens": 20, "return_token_ids": True}
    common |= {"logprobs": True, "top_logprobs": 2}
    name, messages, before = "whole", [], 0
    for question in QUESTIONS:
        answer = ok(post(lola_server, f"{name}/chat", messages=user(question), **common))
        messages += user(question)
        body = {
            "model": "smollm2",
            "messages": messages,
            "cache_salt": uuid.uuid4().hex,
            **common,
            **COLD,
        }
        whole = ok(lola_server.client.post("/v1/chat/completions", json=body))
        assert answer["prompt_token_ids"] == whole["prompt_token_ids"]
        assert_same_words(answer["choices"][0], whole["choices"][0])
        # The first question was asked in another session, by the same test.
        assert told(answer)["restored_tokens"] == before or not before
        before = told(answer)["tokens"]
        content = answer["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": content})
    assert "Paris" in messages[1]["content"]


def test_clients_that_send_everything_again_compute_their_new_tokens_only(lola_server):
    """Nothing to configure, also in the Responses API, which keeps the messages itself."""
    messages, previous, counts = [], {}, []
    # Long enough for a text without a name to be stored.
    for question in (f"{TEXT * 6}\n{QUESTIONS[0]}", *QUESTIONS[1:]):
        messages += user(question)
        body = {"model": "smollm2", "messages": messages, "temperature": 0, "max_tokens": 40}
        body |= {"cache_salt": "resend"}
        answer = ok(lola_server.client.post("/v1/chat/completions", json=body))
        messages.append(
            {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
        )
        counts.append(told(answer)["restored_tokens"])
        body = {"model": "smollm2", "input": question, "temperature": 0, "max_output_tokens": 40}
        body |= {"cache_salt": "responses", **previous}
        answer = ok(lola_server.client.post("/v1/responses", json=body))
        previous = {"previous_response_id": answer["id"]}
        cached = answer["usage"]["input_tokens_details"]["cached_tokens"]
        assert (cached > 20) == (len(counts) > 1), (cached, counts)
    assert counts[0] == 0 and 20 < counts[1] < counts[2]


def test_a_request_starts_from_a_composed_session(tiny):
    for name, text in (("one", TEXT * 8), ("two", "a window is read " * 9)):
        ok(post(tiny, f"several-{name}/append", prompt=text))
    sources = ["several-one", "several-two@1"]
    made = ok(post(tiny, "several/compose", **{"from": sources}))
    assert made["made_of"] == sources_of(sources)
    tokens = ok(tiny.client.get(f"{BASE}/several/tokens"))["tokens"]
    expected = ok(post(tiny, "several/complete", model="tiny", prompt=TEXT, **GREEDY))
    ids = ok(tiny.client.post("/tokenize", json={
        "model": "tiny", "prompt": TEXT, "add_special_tokens": False}))["tokens"]  # fmt: skip

    def asked(start, save="several-on"):
        lola = {"from": start, "save": save}
        body = {"model": "tiny", "prompt": tokens + ids, "kv_transfer_params": {"lola": lola}}
        return tiny.client.post("/v1/completions", json={**body, **GREEDY})

    answer = ok(asked("several@1"))
    assert answer["choices"][0]["text"] == expected["choices"][0]["text"]
    assert told(answer)["restored_tokens"] == made["tokens"] and told(answer)["reason"] is None
    assert ok(tiny.client.get(f"{BASE}/several-on"))["made_of"] == sources_of(sources)
    refused(asked(sources), 400, "from = a list of 2 items: a request starts from one session")
    refused(asked("several@1", "a/b"), 400, "lola.save = 'a/b'")
    gone = ok(tiny.client.delete(f"{BASE}/several-two"))
    assert gone["composed"] == ["several", "several-on"]


def sources_of(references):
    return [name if "@" in name else f"{name}@1" for name in references]


VAULT = "The code of the vault is 73192. Remember this code, because you will need it later. "


def test_a_session_goes_on_by_its_header(lola_server):
    first = complete(lola_server, VAULT, {"X-Session-ID": "http-1"})
    lola = told(first)
    assert (lola["session"], lola["turn"], lola["restored_tokens"]) == ("http-1", 1, 0)
    assert lola["bytes"] > 0 and lola["reason"]
    more = VAULT + first["choices"][0]["text"] + " And what is the code?"
    second = complete(lola_server, more, session_id="http-1")
    lola = told(second)
    assert (lola["session"], lola["turn"], lola["reason"]) == ("http-1", 2, None)
    # The prompt's end at least: the answer's text may be other tokens.
    assert lola["restored_tokens"] >= first["usage"]["prompt_tokens"]
    details = second["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == lola["restored_tokens"]
    alone = complete(lola_server, more, **COLD)
    assert alone["choices"][0]["text"] == second["choices"][0]["text"]
    assert told(alone)["reason"] == "not asked for"
    time.sleep(REFRESH_S)
    scrape = lola_server.client.get("/metrics").text
    assert float(re.search(r"^lola:session_hits_total\{.*\} (\S+)$", scrape, re.M)[1]) >= 1


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("completions", {"prompt": VAULT}),
        ("chat/completions", {"messages": user(VAULT)}),
        ("responses", {"input": VAULT}),
    ],
)
@pytest.mark.parametrize(
    ("fields", "headers", "words"),
    [
        ({}, {"X-Session-ID": "a b"}, "session_id = 'a b'"),
        ({"session_id": "auto-1"}, {}, "given by the server"),
    ],
)
def test_a_conversation_that_would_be_lost(lola_server, route, body, fields, headers, words):
    body = {"model": "smollm2", **body, **fields}
    answer = lola_server.client.post(f"/v1/{route}", json=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
