"""Updates of interval 1 in Triton: few scores are computed anew.

One pair is evicted and at most one folded, so only the least score matters. A page keeps a lower
bound on the recall error of each sparse pair, which every fold lowers (Lemma 1,
`docs/bounds.md`). A score is computed only where the bound does not rule the pair out (Lemma 3).
Where the model has an importance, the bound is multiplied by it as the score is.

- `per_token_score_kernel` takes the place of `update.score_kernel`: one program per row and set.
- `track_fold`, within `update.fold_kernel`, stores the incoming pair's bounds and lowers all
  others.

The rows of `bounds` are `BOUND_ROWS` in `lola_vllm/state.py`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from lola_vllm.kernels.candidates import (
    COUNT_ARGS,
    INDEX_ARGS,
    candidate_importance,
    due_rows,
    gather,
    gather_pairs,
    nth_row,
    recall_error,
)
from lola_vllm.kernels.common import (
    RECALL_EPS,
    entries_of,
    first_key_map,
    h_of,
    map_of,
    pairs_of,
    s_of,
    window_start,
)
from lola_vllm.ops import constants
from lola_vllm.state import BOUND_ROWS

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
BLOCK_P = 64  # pairs whose bounds are lowered at a time
SCORE_WARPS = 8


@triton.jit
def store_bounds(at, ld: tl.constexpr, low, total, value, features, along, scale, ok):
    """Row r of the bounds of each pair to at + r ld."""
    tl.store(at + LOW * ld, low, mask=ok)
    tl.store(at + SUM * ld, total, mask=ok)
    tl.store(at + VALUE * ld, value, mask=ok)
    tl.store(at + FEATURES * ld, features, mask=ok)
    tl.store(at + ALONG * ld, along, mask=ok)
    tl.store(at + SCALE * ld, scale, mask=ok)


@triton.jit
def score_pairs(
    which, ok, wk_ptr, first_map, ws_ptr, h_at, s_at, score_weights_at, pairs_at, bounds_at,
    directions_at, fresh_at, start, sparse_head, kv_head, cols, num_features, SHAPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `[len(which)]` of candidates; sets the bounds on them (Lemma 1).

    Pointers `*_at` are the page's, and `first_map` says where its maps begin. `fresh_at` is the
    row's part of the scratch, which takes the bounds of the incoming pair, as that has no entry
    yet. num_features: as in `read_state`.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    LAM: tl.constexpr = SHAPE.SPARSE_CACHE_SIZE
    pairs = ok[:, None] & (cols < D)[None, :]
    k, v = gather_pairs(pairs_at, which, ok, start, sparse_head, kv_head, cols, SHAPE)
    if SHAPE.HAS_SCORE_WEIGHTS:  # before the loop, for fewer registers in it
        weight = candidate_importance(
            ws_ptr, score_weights_at, k, v, pairs_at[4], which, ok, start, sparse_head, kv_head,
            cols, SHAPE,
        )  # fmt: skip
    value = tl.sqrt_rn(tl.sum(v * v, 1))
    cached, new = ok & (which < LAM), ok & (which == LAM)
    total = tl.zeros([which.shape[0]], tl.float32)
    for i in range(SHAPE.STATES_PER_SET):
        head = sparse_head * SHAPE.STATES_PER_SET + i
        error, size, z, square = recall_error(
            k, v, value, map_of(wk_ptr, first_map + head, SHAPE), h_of(h_at, head, SHAPE),
            s_of(s_at, head, SHAPE), cols, num_features, SHAPE, PRECISION,
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

        at = entries_of(bounds_at, head * NUM_BOUNDS, SHAPE) + which
        store_bounds(at, LAM, low, z, value, features, along, scale, cached)
        at = pairs_of(directions_at, head, SHAPE) + which[:, None] * D + cols[None, :]
        tl.store(at, u.to(tl.int8), mask=cached[:, None] & pairs)
        at = fresh_at + i * (NUM_BOUNDS + D) + tl.zeros_like(which)
        store_bounds(at, 1, low, z, value, features, along, scale, new)
        tl.store(at[:, None] + NUM_BOUNDS + cols[None, :], u, mask=new[:, None] & pairs)

        least = tl.where(value < RECALL_EPS, RECALL_EPS, value)
        total += size if SHAPE.STATES_PER_SET == 1 else tl.div_rn(size, least)
    if SHAPE.HAS_SCORE_WEIGHTS:
        total *= weight
    return tl.where(total != total, float("inf"), total)  # a NaN ranks first, as when sorted


@triton.jit(do_not_specialize=COUNT_ARGS, do_not_specialize_on_alignment=INDEX_ARGS)
def per_token_score_kernel(
    wk_ptr,
    ws_ptr,
    h_ptr,
    s_ptr,
    score_weights_ptr,
    sparse_k_ptr,
    sparse_v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    exact_k_ptr,
    exact_v_ptr,
    bounds_ptr,
    directions_ptr,
    state_indices_ptr,
    n_ptr,
    scores_ptr,
    doubtful_ptr,
    fresh_ptr,
    state_indices_stride,
    n_stride,
    state_page,
    kv_page,
    sparse_page,
    words_page,
    directions_page,
    first_row,
    num_rows,
    SHAPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_LAM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores `[num_rows, Hg, lam + 1]`, float32, of the rows whose cache overflows now. Any grid.

    Exact where they may be the least, else infinite. Scratch: doubtful `[num_rows, Hg, lam]`,
    entries to look at; fresh `[num_rows, Hs, NUM_BOUNDS + d]`, bounds and direction of the incoming
    pair.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    F: tl.constexpr = SHAPE.FEATURE_DIM
    LAM: tl.constexpr = SHAPE.SPARSE_CACHE_SIZE
    C: tl.constexpr = SHAPE.UPDATE_INTERVAL
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    PARTS: tl.constexpr = BLOCK_LAM // BLOCK_T
    cols, part = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_LAM)
    end = first_row + num_rows
    for base in range(first_row, end, BLOCK_R):
        rows = base + tl.arange(0, BLOCK_R)
        due = due_rows(
            state_indices_ptr, n_ptr, state_indices_stride, n_stride, rows, end, LAM, SHAPE
        )
        rank = tl.cumsum(due.to(tl.int32), 0)
        items = tl.sum(due.to(tl.int32), 0) * SHAPE.NUM_SPARSE_HEADS
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            row = nth_row(due, rank, rows, item // SHAPE.NUM_SPARSE_HEADS).to(tl.int64)
            sparse_head = item % SHAPE.NUM_SPARSE_HEADS
            kv_head = sparse_head // (SHAPE.NUM_SPARSE_HEADS // SHAPE.NUM_KV_HEADS)
            page = tl.load(state_indices_ptr + row * state_indices_stride).to(tl.int64)
            n = tl.load(n_ptr + row * n_stride).to(tl.int32)
            start, first_map = window_start(n - C, SHAPE), first_key_map(n, SHAPE)
            # Before the first fold H and s are leftovers, and count as zero.
            num_features = tl.where(start - SHAPE.SINK_SIZE > LAM, F, 0)
            h_at, s_at = h_ptr + page * state_page, s_ptr + page * state_page
            exact_k_at, exact_v_at = exact_k_ptr + page * kv_page, exact_v_ptr + page * kv_page
            pairs_at = (
                sparse_k_ptr + page * sparse_page, sparse_v_ptr + page * sparse_page,
                k_scale_ptr + page * words_page, v_scale_ptr + page * words_page,
                exact_k_at, exact_v_at,
            )  # fmt: skip
            bounds_at = bounds_ptr + page * words_page
            directions_at = directions_ptr + page * directions_page
            scratch = (row - first_row) * SHAPE.NUM_SPARSE_HEADS + sparse_head
            fresh_at = fresh_ptr + scratch * SHAPE.STATES_PER_SET * (NUM_BOUNDS + D)
            scores_at, doubtful_at = scores_ptr + scratch * (LAM + 1), doubtful_ptr + scratch * LAM

            bound = tl.zeros([BLOCK_LAM], tl.float32)
            for i in range(SHAPE.STATES_PER_SET):
                head = sparse_head * SHAPE.STATES_PER_SET + i
                at = entries_of(bounds_at, head * NUM_BOUNDS, SHAPE) + e
                low = tl.load(at + LOW * LAM, mask=e < LAM, other=float("inf"))
                if SHAPE.STATES_PER_SET > 1:
                    value = tl.load(at + VALUE * LAM, mask=e < LAM, other=1.0)
                    low = low / tl.where(value < RECALL_EPS, RECALL_EPS, value)
                bound += low
            if SHAPE.HAS_SCORE_WEIGHTS:
                score_weights_at = score_weights_ptr + page * words_page
                at = entries_of(score_weights_at, sparse_head, SHAPE) + e
                bound *= tl.load(at, mask=e < LAM, other=1.0)
            else:
                score_weights_at = score_weights_ptr  # not read
            bound = tl.where(bound != bound, float("-inf"), bound)  # nothing is known

            # First the incoming pair, and those that are likely the least of their part of the
            # entries.
            likely = tl.argmin(tl.reshape(bound, [PARTS, BLOCK_T]), 0) * BLOCK_T + part
            which = tl.where(part == 0, LAM, likely)
            ok = which <= tl.where(part == 0, LAM, LAM - 1)
            score = score_pairs(
                which, ok, wk_ptr, first_map, ws_ptr, h_at, s_at, score_weights_at, pairs_at,
                bounds_at, directions_at, fresh_at, start, sparse_head, kv_head, cols, num_features,
                SHAPE, PRECISION,
            )  # fmt: skip
            limit = tl.min(tl.where(ok, score, float("inf")), 0)
            place = tl.arange(0, PARTS)[:, None] * BLOCK_T + part[None, :]
            done = tl.reshape((place == likely[None, :]) & (part > 0)[None, :], [BLOCK_LAM])
            doubtful = (e < LAM) & (bound <= limit) & (done == 0)
            tl.store(doubtful_at + tl.cumsum(doubtful.to(tl.int32), 0) - 1, e, mask=doubtful)
            tl.store(scores_at + e, float("inf"), mask=e < LAM)
            tl.debug_barrier()  # lists and scores are written by other threads, too
            tl.store(scores_at + which, score, mask=ok)

            num_doubtful = tl.sum(doubtful.to(tl.int32), 0)
            for first in tl.range(0, num_doubtful, BLOCK_T, num_stages=1):
                ok = first + part < num_doubtful
                which = tl.load(doubtful_at + first + part, mask=ok, other=0)
                score = score_pairs(
                    which, ok, wk_ptr, first_map, ws_ptr, h_at, s_at, score_weights_at, pairs_at,
                    bounds_at, directions_at, fresh_at, start, sparse_head, kv_head, cols,
                    num_features, SHAPE, PRECISION,
                )  # fmt: skip
                tl.store(scores_at + which, score, mask=ok)


@triton.jit
def track_fold(
    bounds_at, directions_at, fresh_at, pairs_at, folded_at, free_at, num_folded, num_new, start,
    sparse_head, kv_head, cols, SHAPE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Carries bounds and directions over an update, before entries are replaced.

    The incoming pair's are stored if it takes an entry; the fold lowers all bounds (Lemma 1).
    Pointers are the page's and the row's; `folded_at` and `free_at` as in `fold_kernel`.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    LAM: tl.constexpr = SHAPE.SPARSE_CACHE_SIZE
    folded = tl.load(folded_at, mask=num_folded > 0, other=LAM)
    entry = tl.load(free_at, mask=num_new > 0, other=0)
    one = tl.zeros([1], tl.int32)
    v = gather(
        pairs_at[1], pairs_at[3], pairs_at[5], one + folded, one == 0, start, sparse_head, kv_head,
        cols, SHAPE,
    ).to(tl.float32)  # fmt: skip
    number, pair = tl.arange(0, 8), tl.arange(0, BLOCK_P)
    overflow, enters = num_folded > 0, num_new > 0
    for i in range(SHAPE.STATES_PER_SET):
        head = sparse_head * SHAPE.STATES_PER_SET + i
        rows_at = entries_of(bounds_at, head * NUM_BOUNDS, SHAPE)
        head_at = pairs_of(directions_at, head, SHAPE)
        known_at = fresh_at + i * (NUM_BOUNDS + D)
        length = tl.load(rows_at + FEATURES * LAM + folded, mask=folded < LAM, other=0.0)
        length += tl.load(
            known_at + FEATURES, mask=folded == tl.where(overflow, LAM, -1), other=0.0
        )
        tl.debug_barrier()  # read by all threads: the incoming pair may take its place
        # A cache with room is filled unscored: nothing is known of what enters it.
        known = tl.load(
            known_at + number, mask=number < tl.where(overflow, NUM_BOUNDS, 0),
            other=tl.where(number == LOW, float("-inf"), 0.0),
        )  # fmt: skip
        tl.store(
            rows_at + number * LAM + entry, known, mask=number < tl.where(enters, NUM_BOUNDS, 0)
        )
        new_u = tl.load(
            known_at + NUM_BOUNDS + cols, mask=cols < tl.where(overflow, D, 0), other=0.0
        )
        tl.store(head_at + entry * D + cols, new_u.to(tl.int8), mask=cols < tl.where(enters, D, 0))
        tl.debug_barrier()
        for first in tl.range(0, tl.where(overflow, LAM, 0), BLOCK_P, num_stages=1):
            at = first + pair
            ok = at < LAM
            u = tl.load(
                head_at + at[:, None] * D + cols[None, :], mask=ok[:, None] & (cols < D)[None, :],
                other=0,
            ).to(tl.float32)  # fmt: skip
            there = tl.sum(u * v, 1) * tl.load(rows_at + SCALE * LAM + at, mask=ok, other=0.0)
            low = tl.load(rows_at + LOW * LAM + at, mask=ok, other=0.0)
            along = tl.load(rows_at + ALONG * LAM + at, mask=ok, other=0.0)
            total = tl.load(rows_at + SUM * LAM + at, mask=ok, other=1.0)
            c = tl.load(rows_at + FEATURES * LAM + at, mask=ok, other=0.0) * length
            ahead = there - (along - low)
            low = tl.where(ahead > 0, low - c / (total + c) * BOUND_FACTOR * ahead, low)
            tl.store(rows_at + LOW * LAM + at, low, mask=ok)
