"""Where prompts have waypoints, and how long their states are kept."""

import pytest
import torch

from lola_vllm.core.ops import context_shift
from lola_vllm.core.ops.contract import PrefillBatch
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.engine.vllm.waypoints import WaypointPlan
from lola_vllm.memory.sessions.shared_prefixes import WAYPOINT_SHARE, Waypoints
from tests.support.sessions import Server, size_of

SHIFTS = ShiftSchedule(length=64, interval=32)


@pytest.mark.parametrize(
    ("interval", "start", "tokens", "expected"),
    [
        (16, 0, 3000, [2240, 2800]),
        (16, 0, 3008, [2256, 2816, 3007]),  # an update follows the last token
        (1, 0, 3000, [2250, 2812, 2999]),
        (16, 2100, 3000, [2800]),  # a quarter before the end, little would be saved
        (16, 2900, 3000, []),
        (16, 0, 1000, [928]),
        (16, 0, 260, []),
    ],
)
def test_waypoints_lie_before_the_ends_that_may_differ(interval, start, tokens, expected):
    assert WaypointPlan(interval, keeps=True).waypoints(start, tokens) == expected
    assert WaypointPlan(interval).waypoints(start, tokens) == []


def test_a_state_covers_one_token_less_unless_something_followed():
    plan = WaypointPlan(16, SHIFTS, keeps=True)
    covered = [n for n in range(60, 100) if plan.covers_one_less(n)]
    # After 64 and 96 tokens the context shifts, before the next one.
    assert covered == [n for n in range(60, 100) if n not in (64, 65, 80, 96, 97)]
    assert not any(WaypointPlan(1).covers_one_less(n) for n in range(1, 9))


@pytest.mark.parametrize("schedule", [None, SHIFTS])
def test_a_step_is_divided_at_waypoints_alone_and_at_context_shifts(schedule):
    batch = PrefillBatch(torch.tensor([3, 4, 5]), torch.tensor([0, 40, 40, 90]),
                         torch.tensor([30, 7, 0]))  # fmt: skip
    stops = {0: [48, 99], 2: [16]}
    bounds = context_shift.segment_bounds(schedule, batch, stops)
    shifts = [64] if schedule else []
    assert bounds == [[30, 48, *shifts, 70], [7], [0, 16, 50]]
    segments = context_shift.split_prefill(schedule, batch, stops)
    assert len(segments) == 2 + len(shifts)
    seen = [[] for _ in range(90)]
    for segment in segments:
        for row, span in zip(segment.batch.state_indices.tolist(), segment.spans, strict=True):
            for token in range(span.start, span.stop):
                seen[token].append(row)
    assert seen == [[3]] * 40 + [[5]] * 50


def test_only_the_newest_waypoints_stay_before_others():
    n, budget = 64, 40 * size_of(64)
    server = Server(memory=budget)
    waypoints = Waypoints(server.store)

    def keep(seed):
        hashes = server.store.prefix_hashes([seed] * n)
        waypoints.save(hashes, n, 1, False, adapter="", salt="", parent=None, ttl=None)
        server.step()
        return server.store.find(hashes, n)

    kept = [keep(seed) for seed in range(13)]
    newest = int(40 * WAYPOINT_SHARE)
    assert [state.superseded for state in kept] == [True] * (13 - newest) + [False] * newest
    assert keep(12) is kept[-1]  # the same again takes nothing
    for seed in range(100, 130):
        server.say([seed] * n, f"s{seed}")
    # 43 states do not fit: the oldest waypoints are gone, and no conversation is.
    assert [state.id in server.store.states for state in kept] == [False] * 3 + [True] * 10
    server.close()
    small = Server(memory=3 * size_of(n))
    few = Waypoints(small.store)
    few.save(small.store.prefix_hashes([1] * n), n, 1, False, adapter="", salt="", parent=None,
             ttl=None)  # fmt: skip
    assert not small.store.states
    small.close()
