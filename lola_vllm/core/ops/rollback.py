"""How far a page goes back: for drafts that are rejected, and tokens that are cut off.

A token writes its pair into a row of the ring. An update or a context shift may come with it, and
neither can be undone. Between them a page takes tokens back by their count alone: what is valid
follows from it, and the next tokens overwrite the rows. Plain numbers, for schedulers.
"""

from __future__ import annotations

from lola_vllm.core.ops.shift_schedule import ShiftSchedule


def reach(num_tokens: int, interval: int, schedule: ShiftSchedule | None = None) -> int:
    """The largest token count from which a page goes back to `num_tokens`.

    Args:
        interval: C, tokens between two updates. schedule: of context shifts; None: there are none.
    """
    farthest = (num_tokens // interval + 1) * interval - 1
    if schedule is None:
        return farthest
    return min(farthest, schedule.next_due(num_tokens))


def longest_draft(
    num_tokens: int,
    interval: int,
    schedule: ShiftSchedule | None = None,
    block_size: int | None = None,
) -> int:
    """How many drafts a step may check after the newest known token.

    0 where an update or the end of a block follows that token: the step that takes it in is a
    plain decode, so that updates do not depend on drafts, and a kept block holds its state.

    Args:
        num_tokens: known ones, the newest of which is not computed.
        interval, schedule: as for `reach`.
        block_size: tokens between two states that are kept for prefix caching; None: none is kept.
    """
    block_size = block_size or interval
    if num_tokens % interval == 0 or num_tokens % block_size == 0:
        return 0
    block_end = reach(num_tokens, block_size)
    return min(reach(num_tokens, interval, schedule), block_end) - num_tokens
