"""Updates of interval 1 in Triton (`docs/algorithm.md`, section 3): few scores are computed anew.

One pair is evicted and at most one folded, so only the least score matters. A page keeps a lower
bound on the recall error of each sparse pair, which every fold lowers; what follows computes a
score only where the bound does not rule the pair out. The choice is the one that all scores give.

- `bounded_score_kernel` takes the place of `update.score_kernel`: one program per row and set.
- `track_fold`, within `update.fold_kernel`, notes what is known of the newcomer and lowers bounds.

What is known is in `csrc/bounds.h`; `csrc/cpu/drift_kernel.h` says why the bound holds.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from lola_vllm.kernels.candidates import (
    COUNT_ARGS,
    INDEX_ARGS,
    RECALL_EPS,
    due_rows,
    gather,
    nth_row,
    recall_error,
)
from lola_vllm.kernels.common import window_start

# Numbers of a pair and state head: the rows of `bounds`.
LOW, SUM, VALUE, FEATURES, ALONG, SCALE, NUMBERS = (tl.constexpr(i) for i in range(7))
SLACK = tl.constexpr(2e-5)  # far beyond rounding errors
MOST_FEATURES = tl.constexpr(1.4143)  # ||phi|| of two softmaxes is at most sqrt(2)

BLOCK_T = 16  # pairs scored at a time: the smallest side of a tensor-core product
BLOCK_P = 64  # pairs whose bounds are lowered at a time
SCORE_WARPS = 8


@triton.jit
def store_numbers(at, ld: tl.constexpr, low, total, value, features, along, scale, ok):
    """Number r of each pair to at + r ld."""
    tl.store(at + LOW * ld, low, mask=ok)
    tl.store(at + SUM * ld, total, mask=ok)
    tl.store(at + VALUE * ld, value, mask=ok)
    tl.store(at + FEATURES * ld, features, mask=ok)
    tl.store(at + ALONG * ld, along, mask=ok)
    tl.store(at + SCALE * ld, scale, mask=ok)


@triton.jit
def score_pairs(
    which, ok, wk_ptr, h_at, s_at, sparse_k_at, sparse_v_at, exact_k_at, exact_v_at, bounds_at,
    directions_at, fresh_at, start, group, kv_head, cols, num_features, D: tl.constexpr,
    F: tl.constexpr, ETA: tl.constexpr, LAM: tl.constexpr, C: tl.constexpr, SINK: tl.constexpr,
    SHARE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `[len(which)]` of candidates, and notes what bounds them from here on.

    Pointers `*_at` are the page's, `fresh_at` the row's part of the scratch: what is known of the
    newcomer, which has no slot yet. num_features: as in `read_state`.
    """
    pairs = ok[:, None] & (cols < D)[None, :]
    k = gather(
        sparse_k_at, exact_k_at, which, ok, start, group, kv_head, cols, D, ETA, LAM, C, SINK
    )
    v = gather(
        sparse_v_at, exact_v_at, which, ok, start, group, kv_head, cols, D, ETA, LAM, C, SINK
    ).to(tl.float32)
    value = tl.sqrt_rn(tl.sum(v * v, 1))
    cached, new = ok & (which < LAM), ok & (which == LAM)
    total = tl.zeros([which.shape[0]], tl.float32)
    for i in range(SHARE):
        head = group * SHARE + i
        error, size, z, square = recall_error(
            k, v, value, wk_ptr + head * D * F, h_at + head * 2 * F * D, s_at + head * 2 * F, cols,
            num_features, D, F, PRECISION,
        )  # fmt: skip
        features = tl.where(num_features > 0, tl.sqrt_rn(square), MOST_FEATURES)

        largest = tl.max(tl.abs(error), 1)
        steps = 127.0 / tl.where(largest > 0, largest, 1.0)
        u = tl.floor(error * steps[:, None] + 0.5)
        u = tl.where(u > -127.0, tl.where(u < 127.0, u, 127.0), -127.0)  # of a NaN too
        u = tl.where(pairs, u, 0.0)
        length = tl.sqrt_rn(tl.sum(u * u, 1))
        scale = tl.where(length > 0, 1.0, 0.0) / tl.where(length > 0, length, 1.0)
        low = tl.sum(u * error, 1) * scale - (size + value) * SLACK
        along = tl.sum(u * v, 1) * scale

        at = bounds_at + head * NUMBERS * LAM + which
        store_numbers(at, LAM, low, z, value, features, along, scale, cached)
        at = directions_at + (head * LAM + which)[:, None] * D + cols[None, :]
        tl.store(at, u.to(tl.int8), mask=cached[:, None] & pairs)
        at = fresh_at + i * (NUMBERS + D) + tl.zeros_like(which)
        store_numbers(at, 1, low, z, value, features, along, scale, new)
        tl.store(at[:, None] + NUMBERS + cols[None, :], u, mask=new[:, None] & pairs)

        least = tl.where(value < RECALL_EPS, RECALL_EPS, value)
        total += size if SHARE == 1 else tl.div_rn(size, least)
    return tl.where(total != total, float("inf"), total)  # a NaN ranks first, as when sorted


@triton.jit(do_not_specialize=COUNT_ARGS, do_not_specialize_on_alignment=INDEX_ARGS)
def bounded_score_kernel(
    wk_ptr,
    h_ptr,
    s_ptr,
    sparse_k_ptr,
    sparse_v_ptr,
    exact_k_ptr,
    exact_v_ptr,
    bounds_ptr,
    directions_ptr,
    slots_ptr,
    n_ptr,
    scores_ptr,
    doubtful_ptr,
    fresh_ptr,
    slots_stride,
    n_stride,
    state_page,
    kv_page,
    bounds_page,
    directions_page,
    first_row,
    num_rows,
    D: tl.constexpr,
    F: tl.constexpr,
    ETA: tl.constexpr,
    LAM: tl.constexpr,
    C: tl.constexpr,
    SINK: tl.constexpr,
    HKV: tl.constexpr,
    HS: tl.constexpr,
    HG: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_LAM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores `[num_rows, Hg, lam + 1]`, float32, of the rows whose cache overflows now. Any grid.

    Exact where they may be the least, else infinite. Scratch: doubtful `[num_rows, Hg, lam]`, slots
    to look at; fresh `[num_rows, Hs, NUMBERS + d]`, what is known of the newcomer.
    """
    SHARE: tl.constexpr = HS // HG
    PARTS: tl.constexpr = BLOCK_LAM // BLOCK_T
    cols, part = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_LAM)
    end = first_row + num_rows
    for base in range(first_row, end, BLOCK_R):
        rows = base + tl.arange(0, BLOCK_R)
        due = due_rows(slots_ptr, n_ptr, slots_stride, n_stride, rows, end, LAM, C, ETA, SINK)
        rank = tl.cumsum(due.to(tl.int32), 0)
        items = tl.sum(due.to(tl.int32), 0) * HG
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            row = nth_row(due, rank, rows, item // HG).to(tl.int64)
            group = item % HG
            kv_head = group // (HG // HKV)
            page = tl.load(slots_ptr + row * slots_stride).to(tl.int64)
            start = window_start(tl.load(n_ptr + row * n_stride).to(tl.int32) - C, C, ETA, SINK)
            # Before the first fold H and s are leftovers, and count as zero.
            num_features = tl.where(start - SINK > LAM, F, 0)
            h_at, s_at = h_ptr + page * state_page, s_ptr + page * state_page
            sparse_k_at, sparse_v_at = sparse_k_ptr + page * kv_page, sparse_v_ptr + page * kv_page
            exact_k_at, exact_v_at = exact_k_ptr + page * kv_page, exact_v_ptr + page * kv_page
            bounds_at = bounds_ptr + page * bounds_page
            directions_at = directions_ptr + page * directions_page
            scratch = (row - first_row) * HG + group
            fresh_at = fresh_ptr + scratch * SHARE * (NUMBERS + D)
            scores_at, doubtful_at = scores_ptr + scratch * (LAM + 1), doubtful_ptr + scratch * LAM

            bound = tl.zeros([BLOCK_LAM], tl.float32)
            for i in range(SHARE):
                at = bounds_at + (group * SHARE + i) * NUMBERS * LAM + e
                low = tl.load(at + LOW * LAM, mask=e < LAM, other=float("inf"))
                if SHARE > 1:
                    value = tl.load(at + VALUE * LAM, mask=e < LAM, other=1.0)
                    low = low / tl.where(value < RECALL_EPS, RECALL_EPS, value)
                bound += low
            bound = tl.where(bound != bound, float("-inf"), bound)  # nothing is known

            # First the newcomer, and those that are likely the least of their part of the slots.
            likely = tl.argmin(tl.reshape(bound, [PARTS, BLOCK_T]), 0) * BLOCK_T + part
            which = tl.where(part == 0, LAM, likely)
            ok = which <= tl.where(part == 0, LAM, LAM - 1)
            score = score_pairs(
                which, ok, wk_ptr, h_at, s_at, sparse_k_at, sparse_v_at, exact_k_at, exact_v_at,
                bounds_at, directions_at, fresh_at, start, group, kv_head, cols, num_features,
                D, F, ETA, LAM, C, SINK, SHARE, PRECISION,
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
                    which, ok, wk_ptr, h_at, s_at, sparse_k_at, sparse_v_at, exact_k_at,
                    exact_v_at, bounds_at, directions_at, fresh_at, start, group, kv_head, cols,
                    num_features, D, F, ETA, LAM, C, SINK, SHARE, PRECISION,
                )  # fmt: skip
                tl.store(scores_at + which, score, mask=ok)


@triton.jit
def track_fold(
    bounds_at, directions_at, fresh_at, sparse_v_at, exact_v_at, folded_at, free_at, num_folded,
    num_new, start, group, kv_head, cols, D: tl.constexpr, ETA: tl.constexpr, LAM: tl.constexpr,
    C: tl.constexpr, SINK: tl.constexpr, SHARE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Carries what a page knows of its pairs over an update, before slots are replaced.

    Pointers are the page's and the row's; `folded_at` and `free_at` as in `fold_kernel`.
    """
    loser = tl.load(folded_at, mask=num_folded > 0, other=LAM)
    slot = tl.load(free_at, mask=num_new > 0, other=0)
    one = tl.zeros([1], tl.int32)
    v = gather(
        sparse_v_at, exact_v_at, one + loser, one == 0, start, group, kv_head, cols,
        D, ETA, LAM, C, SINK,
    ).to(tl.float32)  # fmt: skip
    number, pair = tl.arange(0, 8), tl.arange(0, BLOCK_P)
    overflow, enters = num_folded > 0, num_new > 0
    for i in range(SHARE):
        numbers_at = bounds_at + (group * SHARE + i) * NUMBERS * LAM
        head_at = directions_at + (group * SHARE + i) * LAM * D
        known_at = fresh_at + i * (NUMBERS + D)
        length = tl.load(numbers_at + FEATURES * LAM + loser, mask=loser < LAM, other=0.0)
        length += tl.load(known_at + FEATURES, mask=loser == tl.where(overflow, LAM, -1), other=0.0)
        tl.debug_barrier()  # read by all threads: the newcomer may take its place
        # A cache with room is filled unscored: nothing is known of what enters it.
        known = tl.load(
            known_at + number, mask=number < tl.where(overflow, NUMBERS, 0),
            other=tl.where(number == LOW, float("-inf"), 0.0),
        )  # fmt: skip
        tl.store(
            numbers_at + number * LAM + slot, known, mask=number < tl.where(enters, NUMBERS, 0)
        )
        new_u = tl.load(known_at + NUMBERS + cols, mask=cols < tl.where(overflow, D, 0), other=0.0)
        tl.store(head_at + slot * D + cols, new_u.to(tl.int8), mask=cols < tl.where(enters, D, 0))
        tl.debug_barrier()
        for first in tl.range(0, tl.where(overflow, LAM, 0), BLOCK_P, num_stages=1):
            at = first + pair
            ok = at < LAM
            u = tl.load(
                head_at + at[:, None] * D + cols[None, :], mask=ok[:, None] & (cols < D)[None, :],
                other=0,
            ).to(tl.float32)  # fmt: skip
            there = tl.sum(u * v, 1) * tl.load(numbers_at + SCALE * LAM + at, mask=ok, other=0.0)
            low = tl.load(numbers_at + LOW * LAM + at, mask=ok, other=0.0)
            along = tl.load(numbers_at + ALONG * LAM + at, mask=ok, other=0.0)
            total = tl.load(numbers_at + SUM * LAM + at, mask=ok, other=1.0)
            c = tl.load(numbers_at + FEATURES * LAM + at, mask=ok, other=0.0) * length
            ahead = there - (along - low)
            low = tl.where(ahead > 0, low - c / (total + c) * 1.0001 * ahead, low)
            tl.store(numbers_at + LOW * LAM + at, low, mask=ok)
