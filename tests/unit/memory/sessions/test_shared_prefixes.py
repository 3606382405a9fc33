"""Where prompts branch, what is stored there, and how long it stays."""

from types import SimpleNamespace

import numpy as np
import pytest
from vllm.v1.request import RequestStatus

from lola_vllm.engine.vllm.session_requests import SchedulerHalf
from lola_vllm.engine.vllm.waypoints import WaypointPlan
from lola_vllm.memory.sessions.prefix_hash import HASH_BLOCK, PrefixHashes, namespace
from lola_vllm.memory.sessions.shared_prefixes import RecentPrompts
from tests.support.sessions import Server, names


def text(seed, n):
    return np.random.default_rng(seed).integers(0, 1000, n).tolist()


def hashes(tokens, salt="", adapter=""):
    return PrefixHashes(namespace("", adapter, salt), tokens)


SHARED = text(0, 600)


@pytest.mark.parametrize(
    ("lengths", "branches"),
    [
        ([600, 600, 600], [0, 600, 600]),  # where the second one branches, later ones do
        # Places that save less than a block are left.
        ([HASH_BLOCK - 1] * 2, [0, 0]),
        ([HASH_BLOCK] * 2 + [HASH_BLOCK + 40] * 2, [0] + [HASH_BLOCK] * 3),
    ],
)
def test_prompts_branch_where_they_begin_alike(lengths, branches):
    known = RecentPrompts()
    prompts = [[*SHARED[:n], 1000 + i, *text(i, 50 * i)] for i, n in enumerate(lengths)]
    assert [known.observe(hashes(prompt)) for prompt in prompts] == branches


def test_a_chat_goes_on_from_the_ends_of_its_prompts():
    known, said = RecentPrompts(), []
    for turn in range(5):
        said = said + text(turn, 400)
        assert known.observe(hashes(said)) == 0
        said = said + text(50 + turn, 30)  # the answer


def test_the_same_prompt_branches_before_its_end_until_it_was_read():
    known = RecentPrompts()
    known.observe(hashes(SHARED))
    assert known.observe(hashes(SHARED)) == known.observe(hashes(SHARED)) == 599
    known = RecentPrompts()
    for _ in range(3):
        known.observe(hashes(SHARED))
        known.end(hashes(SHARED))
        assert known.observe(hashes(SHARED)) == 0
    assert known.observe(hashes(SHARED[:500])) == 499
    known.max_tokens = 0
    known.observe(hashes(text(1, 300)))
    assert not known._read and not known._branches


def test_old_prompts_are_forgotten_and_leave_nothing():
    known = RecentPrompts(max_tokens=2000)
    known.observe(hashes([*SHARED, 1000]))
    for seed in range(10, 30):
        known.observe(hashes(text(seed, 500 + 10 * seed)))
    assert known.observe(hashes([*SHARED, 1001])) == 0
    assert known._tokens <= 2000
    assert known._tokens == sum(len(text) for text in known._texts.values())
    known.max_tokens = 0
    known.observe(hashes(SHARED))
    ends = known._ends
    assert not (known._texts or known._newest or ends._states)


class Engine:
    """A scheduler's half, and steps in which each request is read as far as it is asked for."""

    def __init__(self, **settings):
        self.server = Server(**settings)
        self.half = SchedulerHalf(self.server.store, 1000, 4096, WaypointPlan(16, keeps=True))
        self.requests = {}

    def arrive(self, name, tokens, session=None, **lola):
        self.requests[name] = request = SimpleNamespace(
            request_id=name, kv_transfer_params={"lola": lola} if lola else None,
            session_id=session, lora_request=None, prompt_token_ids=tokens, cache_salt=None,
            num_prompt_tokens=len(tokens), skip_reading_prefix_cache=False, num_computed_tokens=0,
            num_tokens=len(tokens) + 1, all_token_ids=[*tokens, 5],
            status=RequestStatus.FINISHED_STOPPED,
        )  # fmt: skip
        self.half.arrive(request)

    def match(self, name):
        """Tokens that a request starts from; None: it waits."""
        found = self.half.match(self.requests[name], 0)
        if found:
            self.half.load(self.requests[name], 2)
        if found is not None:
            self.requests[name].num_computed_tokens = found
        self.server.step()
        return found

    def read(self, name, upto=None):
        """A step up to so many tokens of a prompt, or to its end."""
        request = self.requests[name]
        upto = request.num_prompt_tokens if upto is None else upto
        self.half.end_prompts({name: upto - request.num_computed_tokens}, lambda _: [1])
        request.num_computed_tokens = upto
        self.server.step()

    def finish(self, name):
        told = self.half.finish(self.requests.pop(name), [1])[1]["lola"]
        self.server.step()
        return told

    def ask(self, name, tokens, **more):
        """Tokens that a request starts from that comes alone."""
        self.arrive(name, tokens, **more)
        found = self.match(name)
        self.read(name)
        self.finish(name)
        return found

    def shared(self):
        """Tokens and times of the shared prefixes."""
        states = self.server.store.states.values()
        return [(s.header.num_tokens, s.header.expires) for s in states
                if s.header.session.startswith("shared-")]  # fmt: skip


def test_who_branches_stores_the_state_and_others_wait_for_it():
    engine = Engine()
    assert engine.ask("0", [*SHARED, 1000]) == 0
    before = len(engine.shared())
    for number in (1, 2, 3):
        engine.arrive(f"{number}", [*SHARED, 1000 + number, *text(number, 40)])
    first = engine.match("1")
    assert first < 600 and engine.match("2") is None and engine.match("3") is None
    engine.read("1", 590)
    assert engine.match("2") is None
    engine.read("1", 620)  # past the branch, inside of a step
    assert len(engine.shared()) == before + 1
    assert engine.match("2") == engine.match("3") == 600
    engine.read("1")
    assert engine.finish("1")["turn"] == 1
    # What was read for the request itself is its own.
    (own,) = {s.header.shared_prefix for s in engine.server.store.states.values()
              if s.header.num_tokens > 630 and s.header.session.startswith("auto-")}  # fmt: skip
    assert own == engine.server.store.prefix_hashes(SHARED).prefix_hash(600).hex()


def test_nobody_waits_for_a_request_that_has_gone_and_the_next_stores_the_state():
    engine = Engine()
    engine.ask("0", [*SHARED, 1000])
    for number in (1, 2, 3):
        engine.arrive(f"{number}", [*SHARED, 1000 + number, *text(number, 40)])
    engine.match("1")
    assert engine.match("2") is None
    engine.finish("1")
    assert engine.match("2") is not None and engine.match("3") is None
    engine.read("2")
    assert engine.match("3") == 600
    for state in list(engine.server.store.states.values()):  # for others
        engine.server.store.forget(state)
    assert engine.ask("4", [*SHARED, 1004]) == 0 and engine.ask("5", [*SHARED, 1005]) == 600


def test_a_request_does_not_wait_for_one_that_waits_for_it():
    """Requests of a session run one after the other, whatever they branch from."""
    engine = Engine()
    engine.ask("0", [*SHARED, 1000])
    engine.arrive("1", [*SHARED, 1001], session="talk")
    engine.arrive("2", [*SHARED, 1002], session="talk")
    engine.arrive("3", [*SHARED, 1003])
    assert engine.match("2") is None and engine.match("3") is not None
    assert engine.match("1") is not None  # the third came later


def test_a_shared_prefix_is_kept_no_longer_than_the_request_says():
    engine = Engine()
    engine.ask("0", [*SHARED, 1000])
    engine.ask("1", [*SHARED, 1001], ttl=60)
    (expires,) = (expires for n, expires in engine.shared() if n == 600)
    assert expires is not None and expires - engine.server.clock.now < 60


@pytest.mark.parametrize("lola", [{"from": "other"}, {"from": False}, {"save": False}])
def test_who_takes_no_part_stores_nothing_for_others(lola):
    engine = Engine()
    for number in range(3):
        engine.ask(f"{number}", [*SHARED, 1000 + number], **lola)
    assert 600 not in [n for n, _ in engine.shared()]


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
    server.tell(SHARED[:500], "shared-1", kind="prompt")
    server.ask("delete", reference="first")
    assert names(server) == set()


def test_shared_prefixes_of_other_owners_stay(server):
    server.say(SHARED[:500], "shared-1", kind="prompt", salt="a" * 32)
    server.tell([*SHARED[:500], 1001], "one")
    server.ask("delete", reference="one")
    assert names(server) == {"shared-1"}
