"""How far a page goes back, counted out token by token."""

import pytest

from lola_vllm.core.ops.rollback import longest_draft, reach
from lola_vllm.core.ops.shift_schedule import ShiftSchedule

SCHEDULES = [None, ShiftSchedule(40, 12), ShiftSchedule(32, 8)]


def goes_back(n: int, to: int, interval: int, schedule: ShiftSchedule | None) -> bool:
    """Whether no token between the counts brought an update or a context shift with it."""
    new = range(to + 1, n + 1)
    updates = any(count % interval == 0 for count in new)
    return not updates and not (schedule and any(schedule.due(count - 1) for count in new))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("interval", [1, 4, 7])
def test_a_page_goes_back_to_the_last_update_or_context_shift(interval, schedule):
    for to in range(100):
        counts = [n for n in range(to, 130) if goes_back(n, to, interval, schedule)]
        assert reach(to, interval, schedule) == counts[-1]
        assert counts == list(range(to, counts[-1] + 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("interval", [1, 4, 7])
@pytest.mark.parametrize("block_size", [None, 6, 16])
def test_drafts_end_before_an_update_a_shift_and_a_block(interval, schedule, block_size):
    for known in range(1, 100):
        drafts = longest_draft(known, interval, schedule, block_size)
        ends = {known, known + drafts, *range(known, known + drafts)}
        assert 0 <= drafts < interval
        if drafts:
            assert goes_back(known + drafts, known, interval, schedule)
            assert not any(count % interval == 0 for count in ends)
            assert not any(count % (block_size or interval) == 0 for count in ends)
    if interval > 1 and block_size != 6:
        assert longest_draft(interval + 1, interval, schedule, block_size) == interval - 2


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_the_next_context_shift(schedule):
    for count in range(100):
        assert schedule.next_due(count) == next(n for n in range(count, 200) if schedule.due(n))
