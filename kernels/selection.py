"""Which pairs of a sparse set are scored, and which stay: the lam of largest score, found in passes
over all candidates.

The passes build the least score that stays, eight bits at a time, from histograms of the bits of
the scores (radix selection): O(candidates), and no bound on their number is compiled in.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from lola_vllm.kernels.candidates import position_of

BLOCK_A = 1024  # candidates looked at together
DIGIT_BITS = tl.constexpr(8)
NUM_DIGITS = tl.constexpr(256)
PASSES = tl.constexpr(4)  # of 8 bits, of numbers from 0 to 2^31 - 1
LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def ranked(scores_at, positions_at, e, start, stop, lam, recent, overflow, SHAPE: tl.constexpr):
    """Whether candidates e exist, their positions, and the bits of their scores.

    Scores are not negative, so their bits order as they do. A NaN ranks first, as when sorted, and
    so does a recent pair. Without overflow scores are not read. Pointers: the set's.
    """
    ok, position = position_of(positions_at, e, start, stop, lam, SHAPE)
    scored = ok & (e < tl.where(overflow & (lam > 0), LARGEST, 0))
    score = tl.load(scores_at + e, mask=scored, other=0.0)
    first = (score != score) | (position >= stop - recent)
    return ok, position, tl.where(first, float("inf"), score).to(tl.int32, bitcast=True)


@triton.jit
def nth_largest(
    scores_at, positions_at, start, stop, lam, recent, count, passes, least,
    SHAPE: tl.constexpr, BY_AGE: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """The count-th largest of numbers of candidates, how many of them are as large, and how many of
    these are among the count.

    BY_AGE: the numbers grow with the age of the pairs whose score has the bits `least`; else they
    are the bits of the scores. passes: `PASSES`, or 0 to find 0. count is at least 1 then, and
    there are as many numbers.
    """
    found, equal = 0, 0
    digits = tl.arange(0, NUM_DIGITS)
    for i in range(passes):
        shift = (PASSES - 1 - i) * DIGIT_BITS
        counts = tl.zeros([NUM_DIGITS], tl.int32)
        for base in tl.range(0, lam + SHAPE.UPDATE_INTERVAL, BLOCK_A, num_stages=1):
            e = base + tl.arange(0, BLOCK_A)
            ok, position, number = ranked(
                scores_at, positions_at, e, start, stop, lam, recent, passes > 0, SHAPE
            )
            if BY_AGE:
                ok = ok & (number == least)
                number = LARGEST - position
            ok = ok & (number >> shift >> DIGIT_BITS == found >> shift >> DIGIT_BITS)
            counts += tl.histogram(number >> shift & (NUM_DIGITS - 1), NUM_DIGITS, mask=ok)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.sum((at_least >= count).to(tl.int32), 0) - 1
        count -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        equal = tl.sum(tl.where(digits == digit, counts, 0), 0)
        found = found | (digit << shift)
    return found, equal, count


@triton.jit
def list_older(
    positions_at, listed_at, start, stop, lam, recent, SHAPE: tl.constexpr, BLOCK_A: tl.constexpr
):
    """Lists the candidates that are not recent. Returns their number; readers wait for all
    threads."""
    count = 0
    for base in tl.range(0, lam + SHAPE.UPDATE_INTERVAL, BLOCK_A, num_stages=1):
        e = base + tl.arange(0, BLOCK_A)
        ok, position = position_of(positions_at, e, start, stop, lam, SHAPE)
        older = ok & (position < stop - recent)
        nth = count + tl.cumsum(older.to(tl.int32), 0) - 1
        tl.store(listed_at + nth, e, mask=older)
        count += tl.sum(older.to(tl.int32), 0)
    return count


@triton.jit
def choose(
    scores_at, positions_at, folded_at, new_at, free_at, start, stop, lam, recent,
    SHAPE: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Lists the candidates to fold, the evicted pairs that stay, and entries that are free.

    Those of largest score stay, ties to the older; all of them while there is room. Scores are read
    where there is none and lam > 0. The lists have room for an interval of entries each; of the
    free ones the first are listed. Their readers wait for all threads.

    Returns:
        How many are folded, and how many evicted pairs stay.
    """
    overflow = stop - SHAPE.SINK_SIZE > lam
    passes = tl.where(overflow & (lam > 0), PASSES, 0)
    least, equal, room = nth_largest(
        scores_at, positions_at, start, stop, lam, recent, lam, passes, 0, SHAPE, False, BLOCK_A
    )
    # Else all stay, or none where a set has no entries: no score has these bits.
    least = tl.where(passes > 0, least, tl.where(overflow, LARGEST, -1))
    crowded = equal > room
    youngest, _, _ = nth_largest(
        scores_at, positions_at, start, stop, lam, recent, room,
        tl.where(crowded & (passes > 0), PASSES, 0), least, SHAPE, True, BLOCK_A,
    )  # fmt: skip
    num_folded, num_new, num_free = 0, 0, 0
    for base in tl.range(0, lam + SHAPE.UPDATE_INTERVAL, BLOCK_A, num_stages=1):
        e = base + tl.arange(0, BLOCK_A)
        ok, position, bits = ranked(
            scores_at, positions_at, e, start, stop, lam, recent, overflow, SHAPE
        )
        keep = ok & ((bits > least) | ((bits == least) & (LARGEST - position >= youngest)))
        folded, new, free = ok & (keep == 0), keep & (e >= lam), (e < lam) & (keep == 0)
        nth = num_folded + tl.cumsum(folded.to(tl.int32), 0) - 1
        tl.store(folded_at + nth, e, mask=folded)
        nth = num_new + tl.cumsum(new.to(tl.int32), 0) - 1
        tl.store(new_at + nth, e, mask=new)
        nth = num_free + tl.cumsum(free.to(tl.int32), 0) - 1
        tl.store(free_at + nth, e, mask=free & (nth < SHAPE.UPDATE_INTERVAL))
        num_folded += tl.sum(folded.to(tl.int32), 0)
        num_new += tl.sum(new.to(tl.int32), 0)
        num_free += tl.sum(free.to(tl.int32), 0)
    return num_folded, num_new
