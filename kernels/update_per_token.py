"""Updates of interval 1 in Triton: few scores are computed anew.

One pair is evicted and at most one folded, so only the least score matters. A page keeps a lower
bound on the recall error of each sparse pair, which every fold lowers (Lemma 1,
`docs/bounds.md`). A score is computed only where the bound does not rule the pair out (Lemma 3).
Where the model has an importance, the bound is multiplied by it as the score is.

- `score_bounded`, within `update.score_kernel`: one program per row and set.
- `track_fold`, within `update.fold_kernel`, stores the incoming pair's bounds and lowers all
  others.

The rows of `bounds` are `BOUND_ROWS` in `lola_vllm/core/state.py`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from lola_vllm.core.ops import constants
from lola_vllm.core.state import BOUND_ROWS
from lola_vllm.kernels.candidates import (
    candidate_importance,
    gather,
    gather_pairs,
    recall_error,
    set_at,
)
from lola_vllm.kernels.common import RECALL_EPS
from lola_vllm.kernels.layer import (
    BOUNDS,
    DIRECTIONS,
    SCORE_WEIGHTS,
    entries_of,
    first_key_map,
    h_of,
    map_of,
    num_entries,
    part_of,
    s_of,
    window_start,
)

LOW = tl.constexpr(BOUND_ROWS.index("low"))
SUM = tl.constexpr(BOUND_ROWS.index("sum"))
VALUE = tl.constexpr(BOUND_ROWS.index("value"))
FEATURES = tl.constexpr(BOUND_ROWS.index("features"))
ALONG = tl.constexpr(BOUND_ROWS.index("along"))
SCALE = tl.constexpr(BOUND_ROWS.index("scale"))
NUM_BOUNDS = tl.constexpr(len(BOUND_ROWS))
BOUND_SLACK = tl.constexpr(constants.BOUND_SLACK)
BOUND_FACTOR = tl.constexpr(constants.BOUND_FACTOR)
MAX_FEATURE_NORM = tl.constexpr(constants.MAX_FEATURE_NORM)
DIRECTION_MAX = tl.constexpr(float(constants.DIRECTION_MAX))

BLOCK_T = 16  # pairs scored at a time: the smallest side of a tensor-core product
BLOCK_P = 64  # pairs whose bounds are lowered at a time; times BLOCK_T, those looked at together


@triton.jit
def bounds_of(page_at, group_at, state_head, lam):
    """The bounds on the pairs of a state head of a group."""
    return part_of(page_at, group_at, BOUNDS, tl.float32) + state_head * NUM_BOUNDS * lam


@triton.jit
def directions_of(page_at, group_at, state_head, lam, SHAPE: tl.constexpr):
    """The directions of a state head of a group."""
    return part_of(page_at, group_at, DIRECTIONS, tl.int8) + state_head * lam * SHAPE.HEAD_DIM


@triton.jit
def store_bounds(at, ld, low, total, value, features, along, scale, ok):
    """Row r of the bounds of each pair to at + r ld."""
    tl.store(at + LOW * ld, low, mask=ok)
    tl.store(at + SUM * ld, total, mask=ok)
    tl.store(at + VALUE * ld, value, mask=ok)
    tl.store(at + FEATURES * ld, features, mask=ok)
    tl.store(at + ALONG * ld, along, mask=ok)
    tl.store(at + SCALE * ld, scale, mask=ok)


@triton.jit
def score_pairs(
    which, ok, wk_ptr, ws_ptr, page_at, group_at, sparse_head, kv_head, own_set, own_kv_head, n,
    fresh_at, SHAPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `[len(which)]` of candidates; sets the bounds on them (Lemma 1).

    Heads: of the layer, and `own_*` of the group. `fresh_at` is the set's part of the scratch,
    which takes the bounds of the incoming pair, as that has no entry yet.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    cols = tl.arange(0, SHAPE.BLOCK_D)
    lam = num_entries(group_at)
    start, first_map = window_start(n - SHAPE.UPDATE_INTERVAL, SHAPE), first_key_map(n, SHAPE)
    # Before the first fold H and s are leftovers, and count as zero.
    num_features = tl.where(start - SHAPE.SINK_SIZE > lam, SHAPE.FEATURE_DIM, 0)
    pairs = ok[:, None] & (cols < D)[None, :]
    pairs_at = set_at(page_at, group_at, own_set, own_kv_head, lam, SHAPE)
    k, v = gather_pairs(pairs_at, which, ok, start, lam, cols, SHAPE)
    if SHAPE.HAS_SCORE_WEIGHTS:  # before the loop, for fewer registers in it
        weight = candidate_importance(
            ws_ptr, entries_of(page_at, group_at, SCORE_WEIGHTS, own_set, lam), k, v, pairs_at[4],
            which, ok, start, lam, kv_head, cols, SHAPE,
        )  # fmt: skip
    value = tl.sqrt_rn(tl.sum(v * v, 1))
    cached, new = ok & (which < lam), ok & (which == lam)
    total = tl.zeros([which.shape[0]], tl.float32)
    for i in range(SHAPE.STATES_PER_SET):
        own = own_set * SHAPE.STATES_PER_SET + i
        w_at = map_of(wk_ptr, first_map + sparse_head * SHAPE.STATES_PER_SET + i, SHAPE)
        error, size, z, square = recall_error(
            k, v, value, w_at, h_of(page_at, group_at, own, SHAPE),
            s_of(page_at, group_at, own, SHAPE), cols, num_features, SHAPE, PRECISION,
        )  # fmt: skip
        features = tl.where(num_features > 0, tl.sqrt_rn(square), MAX_FEATURE_NORM)

        largest = tl.max(tl.abs(error), 1)
        steps = DIRECTION_MAX / tl.where(largest > 0, largest, 1.0)
        u = tl.floor(error * steps[:, None] + 0.5)
        # A NaN becomes -DIRECTION_MAX.
        u = tl.where(
            u > -DIRECTION_MAX, tl.where(u < DIRECTION_MAX, u, DIRECTION_MAX), -DIRECTION_MAX
        )
        u = tl.where(pairs, u, 0.0)
        length = tl.sqrt_rn(tl.sum(u * u, 1))
        scale = tl.where(length > 0, 1.0, 0.0) / tl.where(length > 0, length, 1.0)
        low = tl.sum(u * error, 1) * scale - (size + value) * BOUND_SLACK
        along = tl.sum(u * v, 1) * scale

        at = bounds_of(page_at, group_at, own, lam) + which
        store_bounds(at, lam, low, z, value, features, along, scale, cached)
        at = directions_of(page_at, group_at, own, lam, SHAPE) + which[:, None] * D + cols[None, :]
        tl.store(at, u.to(tl.int8), mask=cached[:, None] & pairs)
        at = fresh_at + i * (NUM_BOUNDS + D) + tl.zeros_like(which)
        store_bounds(at, 1, low, z, value, features, along, scale, new)
        tl.store(at[:, None] + NUM_BOUNDS + cols[None, :], u, mask=new[:, None] & pairs)

        least = tl.where(value < RECALL_EPS, RECALL_EPS, value)
        total += size if SHAPE.STATES_PER_SET == 1 else tl.div_rn(size, least)
    if SHAPE.HAS_SCORE_WEIGHTS:
        total *= weight
    return tl.where(total != total, float("inf"), total)  # a NaN ranks first, as when sorted


@triton.jit
def bound_on(page_at, group_at, own_set, e, lam, SHAPE: tl.constexpr):
    """What the scores of the entries e of a set are at least; infinite beyond the last."""
    bound = tl.zeros_like(e).to(tl.float32)
    for i in range(SHAPE.STATES_PER_SET):
        at = bounds_of(page_at, group_at, own_set * SHAPE.STATES_PER_SET + i, lam) + e
        low = tl.load(at + LOW * lam, mask=e < lam, other=float("inf"))
        if SHAPE.STATES_PER_SET > 1:
            value = tl.load(at + VALUE * lam, mask=e < lam, other=1.0)
            low = low / tl.where(value < RECALL_EPS, RECALL_EPS, value)
        bound += low
    if SHAPE.HAS_SCORE_WEIGHTS:
        at = entries_of(page_at, group_at, SCORE_WEIGHTS, own_set, lam) + e
        bound *= tl.load(at, mask=e < lam, other=1.0)
    return tl.where(bound != bound, float("-inf"), bound)  # nothing is known


@triton.jit
def score_bounded(
    wk_ptr, ws_ptr, page_at, group_at, sparse_head, kv_head, own_set, own_kv_head, n, scores_at,
    listed_at, fresh_at, SHAPE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `[lam + 1]` of a set whose cache overflows: exact where they may be the least, else
    infinite. Heads and fresh_at as of `score_pairs`; listed `[lam]`, scratch: entries to look at.
    """
    lam = num_entries(group_at)
    rank, part = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_T)
    # First the incoming pair, and those that are likely the least of their part of the entries.
    lowest = tl.full([BLOCK_T], float("inf"), tl.float32)
    likely = tl.full([BLOCK_T], -1, tl.int32)
    for base in tl.range(0, lam, BLOCK_P * BLOCK_T, num_stages=1):
        e = base + rank[:, None] * BLOCK_T + part[None, :]
        bound = bound_on(page_at, group_at, own_set, e, lam, SHAPE)
        here, at = tl.min(bound, 0, return_indices=True)
        better = (here < lowest) | (likely < 0)
        likely = tl.where(better, base + at * BLOCK_T + part, likely)
        lowest = tl.where(better, here, lowest)
    which = tl.where(part == 0, lam, likely)
    ok = which <= tl.where(part == 0, lam, lam - 1)
    score = score_pairs(
        which, ok, wk_ptr, ws_ptr, page_at, group_at, sparse_head, kv_head, own_set, own_kv_head, n,
        fresh_at, SHAPE, PRECISION,
    )  # fmt: skip
    limit = tl.min(tl.where(ok, score, float("inf")), 0)
    num_doubtful = 0  # whose bounds are as they were; those just scored are not looked at
    for base in tl.range(0, lam, BLOCK_P * BLOCK_T, num_stages=1):
        e = base + rank[:, None] * BLOCK_T + part[None, :]
        done = (e == likely[None, :]) & (part > 0)[None, :]
        bound = bound_on(page_at, group_at, own_set, e, lam, SHAPE)
        doubtful = tl.reshape((e < lam) & (bound <= limit) & (done == 0), [BLOCK_P * BLOCK_T])
        e = tl.reshape(e, [BLOCK_P * BLOCK_T])
        nth = num_doubtful + tl.cumsum(doubtful.to(tl.int32), 0) - 1
        tl.store(listed_at + nth, e, mask=doubtful)
        tl.store(scores_at + e, float("inf"), mask=e < lam)
        num_doubtful += tl.sum(doubtful.to(tl.int32), 0)
    tl.debug_barrier()  # lists and scores are written by other threads, too
    tl.store(scores_at + which, score, mask=ok)
    for first in tl.range(0, num_doubtful, BLOCK_T, num_stages=1):
        ok = first + part < num_doubtful
        which = tl.load(listed_at + first + part, mask=ok, other=0)
        score = score_pairs(
            which, ok, wk_ptr, ws_ptr, page_at, group_at, sparse_head, kv_head, own_set,
            own_kv_head, n, fresh_at, SHAPE, PRECISION,
        )  # fmt: skip
        tl.store(scores_at + which, score, mask=ok)


@triton.jit
def track_fold(
    page_at, group_at, fresh_at, pairs_at, folded_at, free_at, num_folded, num_new, start, own_set,
    lam, cols, SHAPE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Carries bounds and directions over an update, before entries are replaced.

    The incoming pair's are stored if it takes an entry; the fold lowers all bounds (Lemma 1).
    Pointers and heads as in `fold.fold_set`.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    folded = tl.load(folded_at, mask=num_folded > 0, other=lam)
    entry = tl.load(free_at, mask=num_new > 0, other=0)
    one = tl.zeros([1], tl.int32)
    v = gather(
        pairs_at[1], pairs_at[3], pairs_at[5], one + folded, one == 0, start, lam, cols, SHAPE
    ).to(tl.float32)
    number, pair = tl.arange(0, 8), tl.arange(0, BLOCK_P)
    overflow, enters = num_folded > 0, num_new > 0
    for i in range(SHAPE.STATES_PER_SET):
        head = own_set * SHAPE.STATES_PER_SET + i
        rows_at = bounds_of(page_at, group_at, head, lam)
        head_at = directions_of(page_at, group_at, head, lam, SHAPE)
        known_at = fresh_at + i * (NUM_BOUNDS + D)
        length = tl.load(rows_at + FEATURES * lam + folded, mask=folded < lam, other=0.0)
        length += tl.load(
            known_at + FEATURES, mask=folded == tl.where(overflow, lam, -1), other=0.0
        )
        tl.debug_barrier()  # read by all threads: the incoming pair may take its place
        # A cache with room is filled unscored: nothing is known of what enters it.
        known = tl.load(
            known_at + number, mask=number < tl.where(overflow, NUM_BOUNDS, 0),
            other=tl.where(number == LOW, float("-inf"), 0.0),
        )  # fmt: skip
        tl.store(
            rows_at + number * lam + entry, known, mask=number < tl.where(enters, NUM_BOUNDS, 0)
        )
        new_u = tl.load(
            known_at + NUM_BOUNDS + cols, mask=cols < tl.where(overflow, D, 0), other=0.0
        )
        tl.store(head_at + entry * D + cols, new_u.to(tl.int8), mask=cols < tl.where(enters, D, 0))
        tl.debug_barrier()
        for first in tl.range(0, tl.where(overflow, lam, 0), BLOCK_P, num_stages=1):
            at = first + pair
            ok = at < lam
            u = tl.load(
                head_at + at[:, None] * D + cols[None, :], mask=ok[:, None] & (cols < D)[None, :],
                other=0,
            ).to(tl.float32)  # fmt: skip
            there = tl.sum(u * v, 1) * tl.load(rows_at + SCALE * lam + at, mask=ok, other=0.0)
            low = tl.load(rows_at + LOW * lam + at, mask=ok, other=0.0)
            along = tl.load(rows_at + ALONG * lam + at, mask=ok, other=0.0)
            total = tl.load(rows_at + SUM * lam + at, mask=ok, other=1.0)
            c = tl.load(rows_at + FEATURES * lam + at, mask=ok, other=0.0) * length
            ahead = there - (along - low)
            low = tl.where(ahead > 0, low - c / (total + c) * BOUND_FACTOR * ahead, low)
            tl.store(rows_at + LOW * lam + at, low, mask=ok)
