"""The update rule in Triton (LoLA, arXiv 2505.23666, section 3.3): score, then select and fold.

Two kernels of fixed grid, so a CUDA graph can replay them: every program reads the token counts of
all rows, finds those at an update point, and takes its share of their work, or none. What a step
has due is known on the device only; the grid does not depend on it.

- `score_kernel`: self-recall errors of all candidates (cached and evicted pairs) of the due rows.
- `fold_kernel`: picks the lam best of each sparse set, adds the others to H and s, and puts the
  kept incoming pairs into the free entries. One program per row and set, because folding reads the
  entries that replacing overwrites.

With interval 1 the scores come from update_per_token.py, which computes few of them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lola_vllm.kernels.candidates import (
    BLOCK_R,
    COUNT_ARGS,
    INDEX_ARGS,
    candidate_importance,
    candidate_ok,
    due_rows,
    evicted_rows,
    gather_pairs,
    new_importance,
    nth_row,
    recall_error,
)
from lola_vllm.kernels.common import (
    MIN_DOT,
    RECALL_EPS,
    add_dithered,
    dither,
    entries_of,
    features,
    first_key_map,
    h_of,
    int8_numbers,
    int8_scale,
    map_of,
    num_processors,
    page_shape,
    page_strides,
    pairs_of,
    product,
    s_of,
    window_start,
)
from lola_vllm.kernels.update_per_token import (
    BLOCK_P,
    BLOCK_T,
    NUM_BOUNDS,
    per_token_score_kernel,
    track_fold,
)
from lola_vllm.kernels.update_per_token import SCORE_WARPS as PER_TOKEN_SCORE_WARPS
from lola_vllm.ops.contract import HeadGroup
from lola_vllm.state import StateLayout

BLOCK_E = 32  # candidates scored, folded or replaced at a time
PROGRAMS_PER_PROCESSOR = 1  # the registers of one fill it, and idle ones should be one wave
SCORE_WARPS, FOLD_WARPS = 8, 8  # four warps would spill registers at d = 128
# The order of the scores decides which pairs stay exact, so plain TF32 will not do.
PRECISION = "tf32x3"


@triton.jit
def largest(values, count, rounds):
    """The count-th largest of values >= 0 (negative ones do not count), built bit by bit.

    0 where rounds is 0, or where there are fewer values than count.
    """
    found = 0
    for i in range(rounds):
        trial = found | (1 << (30 - i))
        found = tl.where(tl.sum((values >= trial).to(tl.int32), 0) >= count, trial, found)
    return found


@triton.jit
def select(score, position, ok, overflow, LAM: tl.constexpr):
    """The lam candidates of largest score, ties to the older; all of them without overflow.

    Scores are not negative, so their bits order as they do. A NaN ranks first, as when sorted.
    """
    score = tl.where(score != score, float("inf"), score)
    bits = tl.where(ok, score.to(tl.int32, bitcast=True), -1)
    least = largest(bits, LAM, tl.where(overflow, 31, 0))
    tied = bits == least
    room = LAM - tl.sum((bits > least).to(tl.int32), 0)
    crowded = overflow & (tl.sum(tied.to(tl.int32), 0) > room)
    age = tl.where(tied, 0x7FFFFFFF - position, -1)
    youngest = largest(age, room, tl.where(crowded, 31, 0))
    return ok & ((bits > least) | (tied & (age >= youngest)))


@triton.jit
def put(
    sparse_at, scale_at, exact_at, e, entry, ok, start, sparse_head, kv_head, cols,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """Keys or values of evicted pairs into their entries. Returns what they stand for there,
    float32.

    Arguments as of `candidates.gather`; e and entry `[M]`.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    x = evicted_rows(exact_at, e, ok, start, kv_head, cols, SHAPE)
    to = pairs_of(sparse_at, sparse_head, SHAPE) + (entry * D)[:, None] + cols[None, :]
    pair_ok = ok[:, None] & (cols < D)[None, :]
    if not SHAPE.INT8_PAIRS:
        tl.store(to, x, mask=pair_ok)
        return x.to(tl.float32)
    else:
        x = x.to(tl.float32)
        scale = int8_scale(x)
        numbers = int8_numbers(x, scale)
        tl.store(to, numbers.to(tl.int8), mask=pair_ok)
        tl.store(entries_of(scale_at, sparse_head, SHAPE) + entry, scale, mask=ok)
        return numbers * scale[:, None]


@triton.jit(do_not_specialize=COUNT_ARGS, do_not_specialize_on_alignment=INDEX_ARGS)
def score_kernel(
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
    state_indices_ptr,
    n_ptr,
    scores_ptr,
    state_indices_stride,
    n_stride,
    state_page,
    kv_page,
    sparse_page,
    words_page,
    first_row,
    num_rows,
    SHAPE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores `[num_rows, Hg, lam + C]`, float32, of the rows whose cache overflows now. Any grid.

    SRE where a set has one state head, else the mean over its state heads of SRE / ||v||; with a
    importance, times that.
    """
    F: tl.constexpr = SHAPE.FEATURE_DIM
    LAM: tl.constexpr = SHAPE.SPARSE_CACHE_SIZE
    C: tl.constexpr = SHAPE.UPDATE_INTERVAL
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    E: tl.constexpr = LAM + C
    BLOCKS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    cols = tl.arange(0, BLOCK_D)
    end = first_row + num_rows
    for base in range(first_row, end, BLOCK_R):
        rows = base + tl.arange(0, BLOCK_R)
        due = due_rows(
            state_indices_ptr, n_ptr, state_indices_stride, n_stride, rows, end, LAM, SHAPE
        )
        rank = tl.cumsum(due.to(tl.int32), 0)
        items = tl.sum(due.to(tl.int32), 0) * (SHAPE.NUM_SPARSE_HEADS * BLOCKS)
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            row = nth_row(due, rank, rows, item // (SHAPE.NUM_SPARSE_HEADS * BLOCKS)).to(tl.int64)
            sparse_head = item // BLOCKS % SHAPE.NUM_SPARSE_HEADS
            kv_head = sparse_head // (SHAPE.NUM_SPARSE_HEADS // SHAPE.NUM_KV_HEADS)
            page = tl.load(state_indices_ptr + row * state_indices_stride).to(tl.int64)
            n = tl.load(n_ptr + row * n_stride).to(tl.int32)
            start, stop = window_start(n - C, SHAPE), window_start(n, SHAPE)
            first_map = first_key_map(n, SHAPE)

            e = item % BLOCKS * BLOCK_E + tl.arange(0, BLOCK_E)
            ok = (e < E) & candidate_ok(e, start, stop, SHAPE)
            h_at, s_at = h_ptr + page * state_page, s_ptr + page * state_page
            exact_k_at, exact_v_at = exact_k_ptr + page * kv_page, exact_v_ptr + page * kv_page
            pairs_at = (
                sparse_k_ptr + page * sparse_page, sparse_v_ptr + page * sparse_page,
                k_scale_ptr + page * words_page, v_scale_ptr + page * words_page,
                exact_k_at, exact_v_at,
            )  # fmt: skip
            k, v = gather_pairs(pairs_at, e, ok, start, sparse_head, kv_head, cols, SHAPE)
            # Before the first fold H and s are leftovers, and count as zero.
            num_features = tl.where(start - SHAPE.SINK_SIZE > LAM, F, 0)
            if SHAPE.HAS_SCORE_WEIGHTS:  # before the loop, for fewer registers in it
                weight = candidate_importance(
                    ws_ptr, score_weights_ptr + page * words_page, k, v, exact_k_at, e, ok, start,
                    sparse_head, kv_head, cols, SHAPE,
                )  # fmt: skip
            norm = tl.sqrt_rn(tl.sum(v * v, 1))
            least = tl.where(norm < RECALL_EPS, RECALL_EPS, norm)
            total = tl.zeros([BLOCK_E], tl.float32)
            for i in range(SHAPE.STATES_PER_SET):
                head = sparse_head * SHAPE.STATES_PER_SET + i
                _, size, _, _ = recall_error(
                    k, v, norm, map_of(wk_ptr, first_map + head, SHAPE), h_of(h_at, head, SHAPE),
                    s_of(s_at, head, SHAPE), cols, num_features, SHAPE, PRECISION,
                )  # fmt: skip
                total += size if SHAPE.STATES_PER_SET == 1 else tl.div_rn(size, least)
            if SHAPE.STATES_PER_SET > 1:
                total = total / SHAPE.STATES_PER_SET
            if SHAPE.HAS_SCORE_WEIGHTS:
                total *= weight
            at = scores_ptr + ((row - first_row) * SHAPE.NUM_SPARSE_HEADS + sparse_head) * E + e
            tl.store(at, total, mask=ok)


@triton.jit(do_not_specialize=COUNT_ARGS, do_not_specialize_on_alignment=INDEX_ARGS)
def fold_kernel(
    wk_ptr,
    ws_ptr,
    h_ptr,
    s_ptr,
    positions_ptr,
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
    lists_ptr,
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
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    KEEPS_BOUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Select, fold and replace in the rows that are due; scratch lists `[num_rows, Hg, 3, C]`.

    Any grid. The lists hold the candidates to fold, the incoming pairs to keep, and the free
    entries. KEEPS_BOUNDS: the scores are of `per_token_score_kernel`, which left `fresh`.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    F: tl.constexpr = SHAPE.FEATURE_DIM
    LAM: tl.constexpr = SHAPE.SPARSE_CACHE_SIZE
    C: tl.constexpr = SHAPE.UPDATE_INTERVAL
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    BLOCK_F: tl.constexpr = SHAPE.BLOCK_F
    E: tl.constexpr = LAM + C
    cols, feats = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    col_ok, feat_ok = cols < D, feats < F
    tile_ok = feat_ok[:, None] & col_ok[None, :]
    end = first_row + num_rows
    for base in range(first_row, end, BLOCK_R):
        rows = base + tl.arange(0, BLOCK_R)
        due = due_rows(
            state_indices_ptr, n_ptr, state_indices_stride, n_stride, rows, end, 0, SHAPE
        )
        rank = tl.cumsum(due.to(tl.int32), 0)
        items = tl.sum(due.to(tl.int32), 0) * SHAPE.NUM_SPARSE_HEADS
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            row = nth_row(due, rank, rows, item // SHAPE.NUM_SPARSE_HEADS).to(tl.int64)
            sparse_head = item % SHAPE.NUM_SPARSE_HEADS
            kv_head = sparse_head // (SHAPE.NUM_SPARSE_HEADS // SHAPE.NUM_KV_HEADS)
            page = tl.load(state_indices_ptr + row * state_indices_stride).to(tl.int64)
            n = tl.load(n_ptr + row * n_stride).to(tl.int32)
            start, stop = window_start(n - C, SHAPE), window_start(n, SHAPE)
            first_map = first_key_map(n, SHAPE)
            overflow = stop - SHAPE.SINK_SIZE > LAM
            # Before the first fold H and s are leftovers, and count as zero.
            live = feats < tl.where(start - SHAPE.SINK_SIZE > LAM, F, 0)
            scratch = (row - first_row) * SHAPE.NUM_SPARSE_HEADS + sparse_head
            positions_at = entries_of(positions_ptr + page * words_page, sparse_head, SHAPE)
            exact_k_at, exact_v_at = exact_k_ptr + page * kv_page, exact_v_ptr + page * kv_page
            pairs_at = (
                sparse_k_ptr + page * sparse_page, sparse_v_ptr + page * sparse_page,
                k_scale_ptr + page * words_page, v_scale_ptr + page * words_page,
                exact_k_at, exact_v_at,
            )  # fmt: skip

            e = tl.arange(0, BLOCK_ALL)
            ok = (e < E) & candidate_ok(e, start, stop, SHAPE)
            position = start + e - LAM
            if LAM > 0:
                held = tl.load(positions_at + e, mask=ok & (e < LAM), other=0)
                position = tl.where(e < LAM, held, position)
            scored = ok & (e < tl.where(overflow, E, 0))
            score = tl.load(scores_ptr + scratch * E + e, mask=scored, other=0.0)
            if SHAPE.RECENT_SIZE > 0:
                score = tl.where(position >= stop - SHAPE.RECENT_SIZE, float("inf"), score)
            keep = select(score, position, ok, overflow, LAM)

            folded, free = ok & (keep == 0), (e < LAM) & (keep == 0)
            new = keep & (e >= LAM)
            folded_at, new_at = lists_ptr + scratch * 3 * C, lists_ptr + (scratch * 3 + 1) * C
            free_at = lists_ptr + (scratch * 3 + 2) * C
            tl.store(folded_at + tl.cumsum(folded.to(tl.int32), 0) - 1, e, mask=folded)
            tl.store(new_at + tl.cumsum(new.to(tl.int32), 0) - 1, e, mask=new)
            nth_free = tl.cumsum(free.to(tl.int32), 0) - 1
            tl.store(free_at + nth_free, e, mask=free & (nth_free < C))
            num_folded = tl.sum(folded.to(tl.int32), 0)
            num_new = tl.sum(new.to(tl.int32), 0)
            tl.debug_barrier()  # the lists are read by other threads than wrote them

            # Two halves of the features for each state head, so that a half of H fits registers.
            for half in tl.range(
                0, tl.where(num_folded > 0, 2 * SHAPE.STATES_PER_SET, 0), num_stages=1
            ):
                head = sparse_head * SHAPE.STATES_PER_SET + half // 2
                sign = 1.0 - 2.0 * (half % 2)
                w_at = map_of(wk_ptr, first_map + head, SHAPE) + cols[:, None] * F + feats[None, :]
                w = tl.load(w_at, mask=col_ok[:, None] & feat_ok[None, :], other=0.0)
                h_at = h_of(h_ptr + page * state_page, head, SHAPE) + half % 2 * F * D
                h_at = h_at + feats[:, None] * D + cols[None, :]
                s_at = s_of(s_ptr + page * state_page, head, SHAPE) + half % 2 * F + feats
                more_h = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
                more_s = tl.zeros([BLOCK_F], tl.float32)
                for c in tl.range(0, num_folded, BLOCK_E, num_stages=1):
                    index = c + tl.arange(0, BLOCK_E)
                    some = index < num_folded
                    which = tl.load(folded_at + index, mask=some, other=0)
                    k, v = gather_pairs(
                        pairs_at, which, some, start, sparse_head, kv_head, cols, SHAPE
                    )
                    y = product(k, w, tl.zeros([BLOCK_E, BLOCK_F], tl.float32), PRECISION)
                    phi = tl.where(some[:, None], features(y * sign, feat_ok), 0.0)
                    more_h = product(tl.trans(phi), v, more_h, PRECISION)
                    more_s += tl.sum(phi, 0)
                place = dither(n // C, half % 2 * F + feats)
                h = tl.load(h_at, mask=live[:, None] & col_ok[None, :], other=0.0)
                tl.store(h_at, add_dithered(h, more_h, place[:, None]), mask=tile_ok)
                s = tl.load(s_at, mask=live, other=0.0)
                tl.store(s_at, add_dithered(s, more_s, place), mask=feat_ok)

            if KEEPS_BOUNDS:
                fresh_at = fresh_ptr + scratch * SHAPE.STATES_PER_SET * (NUM_BOUNDS + D)
                track_fold(
                    bounds_ptr + page * words_page, directions_ptr + page * directions_page,
                    fresh_at, pairs_at, folded_at, free_at, num_folded, num_new, start,
                    sparse_head, kv_head, cols, SHAPE, BLOCK_P,
                )  # fmt: skip
            if LAM > 0:
                tl.debug_barrier()  # the folded pairs are read: their entries may go
                for c in tl.range(0, num_new, BLOCK_E, num_stages=1):
                    index = c + tl.arange(0, BLOCK_E)
                    some = index < num_new
                    which = tl.load(new_at + index, mask=some, other=LAM)
                    entry = tl.load(free_at + index, mask=some, other=0)
                    tl.store(positions_at + entry, start + which - LAM, mask=some)
                    k = put(
                        pairs_at[0], pairs_at[2], exact_k_at, which, entry, some, start,
                        sparse_head, kv_head, cols, SHAPE,
                    )  # fmt: skip
                    v = put(
                        pairs_at[1], pairs_at[3], exact_v_at, which, entry, some, start,
                        sparse_head, kv_head, cols, SHAPE,
                    )  # fmt: skip
                    if SHAPE.HAS_SCORE_WEIGHTS:
                        w = new_importance(
                            ws_ptr, k, v, exact_k_at, which, some, start, kv_head, cols, SHAPE
                        )
                        score_weights_at = score_weights_ptr + page * words_page
                        tl.store(
                            entries_of(score_weights_at, sparse_head, SHAPE) + entry, w, mask=some
                        )


class Scratch(NamedTuple):
    """What kernels of an update leave for the next one, for `num_rows` rows.

    scores `[num_rows, Hg, lam + C]`, float32. lists `[num_rows, Hg, 3, C]`, int32. Where scores are
    bounded also doubtful `[num_rows, Hg, lam]`, int32, and fresh `[num_rows, Hs, NUM_BOUNDS + d]`,
    float32; else both are empty.
    """

    scores: Tensor
    lists: Tensor
    doubtful: Tensor
    fresh: Tensor


class Rows(NamedTuple):
    """The rows that an update looks at.

    Attributes:
        state_indices, seq_lens: `[>= first + num_rows]`, any integer dtypes: each row's page and
            tokens.
        first, num_rows: the range of rows.
    """

    state_indices: Tensor
    seq_lens: Tensor
    first: int
    num_rows: int


def update(group: HeadGroup, rows: Rows, scratch: Scratch, score: bool = True) -> None:
    """Evict, rescore, select, fold and replace in the rows that are at an update point.

    Args:
        scratch: from `scratch_buffers`.
        score: False where the caller knows that no row's cache overflows.
    """
    layout, views, key_maps = group.layout, group.views, group.weights.key_maps
    importance = group.weights.importance
    strides = page_strides(group)
    state_indices, n, first_row, num_rows = rows
    own = page_shape(layout, group.weights.rotated_map_after)
    shape = {"SHAPE": own, "BLOCK_R": BLOCK_R, "PRECISION": PRECISION}
    Hg, lam = layout.num_sparse_heads, layout.sparse_cache_size
    E = lam + layout.update_interval
    most = PROGRAMS_PER_PROCESSOR * num_processors(views.H.device)
    sets = min(most, num_rows * Hg)
    pairs = (
        views.sparse_k, views.sparse_v, views.sparse_k_scale, views.sparse_v_scale, views.exact_k,
        views.exact_v,
    )  # fmt: skip
    if not score or lam == 0:
        pass  # all that leaves the window enters the cache, or all is folded
    elif layout.keeps_bounds:
        per_token_score_kernel[(sets,)](
            key_maps, importance, views.H, views.s, views.score_weights, *pairs, views.bounds,
            views.directions, state_indices, n, scratch.scores, scratch.doubtful, scratch.fresh,
            state_indices.stride(0), n.stride(0), *strides, first_row, num_rows, **shape,
            **per_token_constants(layout), num_warps=PER_TOKEN_SCORE_WARPS,
        )  # fmt: skip
    else:
        score_kernel[(min(most, num_rows * Hg * triton.cdiv(E, BLOCK_E)),)](
            key_maps, importance, views.H, views.s, views.score_weights, *pairs, state_indices, n,
            scratch.scores, state_indices.stride(0), n.stride(0), *strides[:-1], first_row,
            num_rows, **shape, BLOCK_E=BLOCK_E, num_warps=SCORE_WARPS,
        )  # fmt: skip
    fold_kernel[(sets,)](
        key_maps, importance, views.H, views.s, views.positions, views.score_weights, *pairs,
        views.bounds, views.directions, state_indices, n, scratch.scores, scratch.lists,
        scratch.fresh, state_indices.stride(0), n.stride(0), *strides, first_row, num_rows, **shape,
        **fold_constants(layout), num_warps=FOLD_WARPS,
    )  # fmt: skip


def fold_constants(layout: StateLayout) -> dict[str, int]:
    """`fold_kernel`'s compile-time arguments beside SHAPE, BLOCK_R and PRECISION."""
    interval = layout.update_interval  # pairs folded at an update
    most = MIN_DOT if layout.int8_pairs else BLOCK_E  # int8 keys are widened to float32
    return {
        "BLOCK_E": min(most, max(MIN_DOT, triton.next_power_of_2(interval))),
        "BLOCK_ALL": triton.next_power_of_2(layout.sparse_cache_size + interval),
        "BLOCK_P": BLOCK_P,
        "KEEPS_BOUNDS": layout.keeps_bounds,
    }


def per_token_constants(layout: StateLayout) -> dict[str, int]:
    """`per_token_score_kernel`'s compile-time arguments beside SHAPE, BLOCK_R and PRECISION."""
    entries = max(BLOCK_T, triton.next_power_of_2(layout.sparse_cache_size))
    return {"BLOCK_T": BLOCK_T, "BLOCK_LAM": entries}


def scratch_buffers(layout: StateLayout, num_rows: int, device: torch.device) -> Scratch:
    """Scratch of updates of up to `num_rows` rows."""
    Hg, lam, C = layout.num_sparse_heads, layout.sparse_cache_size, layout.update_interval
    rows = num_rows if layout.keeps_bounds else 0
    known = NUM_BOUNDS.value + layout.head_dim
    return Scratch(
        torch.empty(num_rows, Hg, lam + C, dtype=torch.float32, device=device),
        torch.empty(num_rows, Hg, 3, C, dtype=torch.int32, device=device),
        torch.empty(rows, Hg, lam, dtype=torch.int32, device=device),
        torch.empty(rows, layout.num_state_heads, known, dtype=torch.float32, device=device),
    )
