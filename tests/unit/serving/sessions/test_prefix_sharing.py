"""Where in a prompt a state is of use to others."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from vllm import SamplingParams

from lola_vllm.memory.sessions.prefix_hash import PrefixHashes, namespace
from lola_vllm.memory.sessions.request import OWN_REQUEST
from lola_vllm.serving.sessions.prefix_sharing import PrefixSharing, RecentPrompts
from tests.support.sessions import Server


def text(seed, n):
    return np.random.default_rng(seed).integers(0, 1000, n).tolist()


def hashes(tokens, salt="", adapter=""):
    return PrefixHashes(namespace("", adapter, salt), tokens)


def places(point):
    return None if point is None else (point.num_tokens, point.new)


SHARED = text(0, 600)


def test_the_second_prompt_is_read_in_parts_and_later_ones_start_there():
    known = RecentPrompts()
    assert known.observe(hashes([*SHARED, 1000, *text(1, 300)])) is None
    assert places(known.observe(hashes([*SHARED, 1001, *text(2, 50)]))) == (600, True)
    point = known.observe(hashes([*SHARED, 1002, *text(3, 500)]))
    assert places(point) == (600, False) and point.prefix_hash == hashes(SHARED).prefix_hash(600)


def test_a_chat_goes_on_from_the_ends_of_its_prompts():
    known, said, before = RecentPrompts(), [], None
    for turn in range(5):
        said = said + text(turn, 400)
        assert places(known.observe(hashes(said))) == before
        before = len(said), False
        said = said + text(50 + turn, 30)  # the answer


def test_the_same_prompt_while_it_is_read_leaves_a_token_to_compute():
    known = RecentPrompts()
    known.observe(hashes(SHARED))
    assert places(known.observe(hashes(SHARED))) == (599, True)
    assert places(known.observe(hashes(SHARED))) == (599, False)


@pytest.mark.parametrize("other", [{"salt": "b"}, {"adapter": "b"}])
def test_salts_and_adapters_share_nothing(other):
    known = RecentPrompts()
    known.observe(hashes([*SHARED, 1000]))
    assert known.observe(hashes([*SHARED, 1001], **other)) is None
    assert places(known.observe(hashes([*SHARED, 1001]))) == (600, True)


def test_a_state_that_is_gone_is_stored_again():
    known = RecentPrompts()
    known.observe(hashes([*SHARED, 1000]))
    known.observe(hashes([*SHARED, 1001]))
    again = hashes([*SHARED, 1002])
    assert places(known.observe(again)) == (600, False)
    known.forget(again, above=0, upto=600)
    assert places(known.observe(hashes([*SHARED, 1003]))) == (600, True)


def test_old_prompts_are_forgotten_and_leave_nothing():
    known = RecentPrompts(max_tokens=2000)
    known.observe(hashes([*SHARED, 1000]))
    for seed in range(10, 30):
        known.observe(hashes(text(seed, 500 + 10 * seed)))
    assert known.observe(hashes([*SHARED, 1001])) is None
    assert known._tokens <= 2000
    assert known._tokens == sum(len(text) for text in known._texts.values())
    known.max_tokens = 0
    known.observe(hashes(SHARED))
    points = known._branch_points
    assert not (known._texts or known._newest or points._tails or points._states)


class Engine:
    """An engine client that has stored what its requests said, and restores the longest part."""

    def __init__(self):
        self.asked, self.stored = [], []

    async def generate(self, prompt, params, request_id, **kwargs):
        tokens = prompt["prompt_token_ids"]
        lola = (params.extra_args or {}).get("kv_transfer_params", {}).get("lola", {})
        self.asked.append((request_id, len(tokens), lola))
        await asyncio.sleep(0)
        found = [t for t in self.stored if t == tokens[: len(t)] and len(t) < len(tokens)]
        restored = max(map(len, found), default=0)
        self.stored.append(tokens)
        yield SimpleNamespace(num_cached_tokens=restored, kv_transfer_params=None)
        yield SimpleNamespace(
            num_cached_tokens=restored,
            kv_transfer_params={"lola": {"restored_tokens": restored, "reason": None}},
        )


async def ask(shared, tokens, **lola):
    """Cached and restored tokens, as a client is told."""
    params = SamplingParams(extra_args={"kv_transfer_params": {"lola": lola}} if lola else None)
    async for output in shared.generate({"prompt_token_ids": tokens}, params, "cmpl-1"):
        final = output
    return final.num_cached_tokens, final.kv_transfer_params["lola"]["restored_tokens"]


def test_what_is_computed_for_a_request_itself_is_not_cached():
    engine = Engine()
    shared = PrefixSharing(engine.generate)

    async def run():
        first = await ask(shared, [*SHARED, 1000])
        # Two at once: one computes the common part, the other finds it.
        second = await asyncio.gather(ask(shared, [*SHARED, 1001]), ask(shared, [*SHARED, 1002]))
        return first, second, await ask(shared, [*SHARED, 1003])

    first, second, third = asyncio.run(run())
    assert first == (0, 0) and third == (600, 600)
    assert sorted(second) == [(0, 0), (600, 600)]
    own = [asked for asked in engine.asked if asked[0].startswith(OWN_REQUEST)]
    assert [n for _, n, _ in own] == [600]


def test_a_shared_prefix_is_kept_no_longer_than_the_request_says():
    engine = Engine()
    shared = PrefixSharing(engine.generate)
    asyncio.run(ask(shared, [*SHARED, 1000]))
    asyncio.run(ask(shared, [*SHARED, 1001], ttl=60))
    (lola,) = (lola for name, _, lola in engine.asked if name.startswith(OWN_REQUEST))
    assert lola.pop("save").startswith("shared-")
    assert lola == {"answer": False, "ttl": 60.0}


@pytest.fixture(params=["memory", "disk"])
def server(request, tmp_path):
    server = Server(None if request.param == "memory" else tmp_path)
    yield server
    server.close()


def names(server):
    return {state.header.session for state in server.store.states.values()}


def test_a_shared_prefix_is_deleted_with_the_last_that_goes_on_from_it(server):
    server.say(SHARED[:300], "shared-1", kind="prompt")
    server.say(SHARED[:500], "shared-2", kind="prompt")
    server.say([*SHARED[:500], 1001], "one", kind="prompt")
    server.say([*SHARED[:500], 1001, *text(1, 50)], "one")
    server.say([*SHARED[:500], 1002], "two")
    server.say([*SHARED[:300], 1003], "three")
    server.say(text(7, 300), "shared-3", kind="prompt")  # of another text
    server.settle()
    server.ask("delete", reference="one@1")
    assert names(server) == {"shared-1", "shared-2", "shared-3", "one", "two", "three"}
    server.ask("delete", reference="one")
    assert names(server) == {"shared-1", "shared-2", "shared-3", "two", "three"}
    server.ask("delete", reference="two")
    assert names(server) == {"shared-1", "shared-3", "three"}
    server.ask("delete", reference="three")
    assert names(server) == {"shared-3"}


def test_a_prefix_goes_with_the_first_of_the_prompts_that_had_it(server):
    """That prompt was read before its prefix was stored, so its states do not name it."""
    server.say([*SHARED[:500], 1001], "first")
    server.say(SHARED[:500], "shared-1", kind="prompt")
    server.settle()
    server.ask("delete", reference="first")
    assert names(server) == set()


def test_shared_prefixes_of_other_owners_stay(server):
    server.say(SHARED[:500], "shared-1", kind="prompt", salt="a" * 32)
    server.say([*SHARED[:500], 1001], "one")
    server.settle()
    server.ask("delete", reference="one")
    assert names(server) == {"shared-1"}
