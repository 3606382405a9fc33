"""What requests ask of the store: read in bounded time, and refused in words."""

import time
from types import SimpleNamespace

import pytest

from lola_vllm.engine.vllm.session_requests import SchedulerHalf
from lola_vllm.memory.sessions.request import MAX_FAULTS, RequestState, read_params
from tests.support.sessions import Server

LONG = "x" * 3_000_000
MANY = {f"{n:06}": 0 for n in range(200_000)}


@pytest.mark.parametrize(
    "lola",
    [
        MANY,
        {LONG: 0},
        list(MANY),
        10**4000,
        {"from": f"a@{LONG}"},
        {"save": list(MANY)},
        {"answer": LONG, "ttl": LONG, "save": LONG, "from": LONG},
    ],
    ids=["names", "name", "list", "number", "turn", "save", "all"],
)
def test_parameters_of_megabytes_are_read_at_once_and_shortly_refused(lola):
    begin = time.thread_time()
    found = read_params({"lola": lola})
    req_state = RequestState(found, "", "", None)
    for fault in found.faults:
        req_state.explain(fault)
    text = req_state.answer()["lola"]["reason"]
    assert time.thread_time() - begin < 0.05
    assert 1 <= len(found.faults) <= MAX_FAULTS and len(text) < 600
    assert not found.restore and not found.save


def request(name, tokens, session=None, **fields):
    """A request as vLLM's scheduler has it."""
    return SimpleNamespace(
        request_id=name, kv_transfer_params=fields.pop("params", None), session_id=session,
        lora_request=None, prompt_token_ids=tokens, cache_salt=None, num_prompt_tokens=len(tokens),
        skip_reading_prefix_cache=fields.pop("logprobs", False), num_computed_tokens=len(tokens),
        num_tokens=len(tokens) + 1, all_token_ids=[*tokens, 5], **fields,
    )  # fmt: skip


TEXT = list(range(100, 400))


@pytest.fixture
def half():
    server = Server()
    half = SchedulerHalf(server.store, block_size=1000, trained_length=256)
    return half


def finish(half, asked):
    from vllm.v1.request import RequestStatus

    asked.status = RequestStatus.FINISHED_STOPPED
    return half.finish(asked, [1])[1]["lola"]


def test_requests_of_a_session_that_wait_are_told_so(half):
    first, second = request("1", TEXT, "agent"), request("2", TEXT, "agent")
    for asked in (first, second):
        half.arrive(asked)
    assert half.match(second, 0) is None and half.match(first, 0) == 0
    assert "waited" not in (finish(half, first)["reason"] or "")
    assert half.match(second, 0) is not None
    assert finish(half, second)["reason"].startswith(
        "waited for another request of session 'agent': one at a time"
    )


def test_beyond_the_trained_length_the_client_is_told_how_far(half):
    long, short = request("1", TEXT), request("2", TEXT[:200])
    for asked, beyond in ((long, 301 - 256), (short, 0)):
        half.arrive(asked)
        assert finish(half, asked)["beyond_trained_length"] == beyond


def test_a_turn_that_a_slow_disk_does_not_take_is_in_memory_and_says_so(tmp_path):
    server = Server(tmp_path)
    half = SchedulerHalf(server.store, block_size=1000, trained_length=256)
    for number, limit in ((1, 4), (2, 0)):
        server.store.max_waiting = limit
        asked = request(str(number), [number, *TEXT], "agent")
        half.arrive(asked)
        told = finish(half, asked)
        assert told["turn"] == number and "unsaved" not in told
        assert told.get("unwritten", "").endswith("the disk is too slow") == (limit == 0)
    first, second = server.ask("show", session="agent")["states"]
    assert first["unwritten"] is None and second["unwritten"] == told["unwritten"]
    assert second["tiers"] == ["memory"]


def test_log_probabilities_of_a_prompt_start_from_no_state(half):
    first = request("1", TEXT)
    half.arrive(first)
    finish(half, first)
    plain = request("2", [*TEXT, 7])
    half.arrive(plain)
    assert half.match(plain, 0) == len(TEXT)
    asked = request("3", [*TEXT, 7], logprobs=True)
    half.arrive(asked)
    assert half.match(asked, 0) == 0
    told = finish(half, asked)
    assert told["restored_tokens"] == 0 and "log-probabilities" in told["reason"]
