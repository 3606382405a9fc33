"""An update of one sparse set: scores of its candidates, then choice, folds and new entries.

Device functions, for kernels that give each program a set.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from lola_vllm.kernels.candidates import (
    candidate_importance,
    candidate_ok,
    evicted_rows,
    gather_pairs,
    new_importance,
    recall_error,
    set_at,
)
from lola_vllm.kernels.common import (
    RECALL_EPS,
    add_dithered,
    dither,
    features,
    int8_numbers,
    int8_scale,
    product,
)
from lola_vllm.kernels.layer import (
    POSITIONS,
    RECENT_SIZE,
    SCORE_WEIGHTS,
    any_folded,
    entries_of,
    first_key_map,
    h_of,
    map_of,
    num_entries,
    part_of,
    s_of,
    window_start,
)
from lola_vllm.kernels.selection import choose, list_older


@triton.jit
def score_tile(
    wk_ptr, ws_ptr, page_at, group_at, sparse_head, kv_head, own_set, own_kv_head, n, e, ok,
    scores_at, SHAPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the candidates e that are ok of a set whose cache overflows, to scores_at + e.

    SRE where a set has one state head, else the mean over its state heads of SRE / ||v||; with a
    importance, times that. Heads: of the layer, and `own_*` of the group.
    """
    C: tl.constexpr = SHAPE.UPDATE_INTERVAL
    cols = tl.arange(0, SHAPE.BLOCK_D)
    lam = num_entries(group_at)
    start = window_start(n - C, SHAPE)
    pairs_at = set_at(page_at, group_at, own_set, own_kv_head, lam, SHAPE)
    first_map = first_key_map(n, SHAPE)
    k, v = gather_pairs(pairs_at, e, ok, start, lam, cols, SHAPE)
    # Before the first fold H and s are leftovers, and count as zero.
    num_features = tl.where(any_folded(group_at, start, SHAPE), SHAPE.FEATURE_DIM, 0)
    if SHAPE.HAS_SCORE_WEIGHTS:  # before the loop, for fewer registers in it
        weight = candidate_importance(
            ws_ptr, entries_of(page_at, group_at, SCORE_WEIGHTS, own_set, lam), k, v,
            pairs_at[4], e, ok, start, lam, kv_head, cols, SHAPE,
        )  # fmt: skip
    norm = tl.sqrt_rn(tl.sum(v * v, 1))
    least = tl.where(norm < RECALL_EPS, RECALL_EPS, norm)
    total = tl.zeros([e.shape[0]], tl.float32)
    for i in range(SHAPE.STATES_PER_SET):
        own = own_set * SHAPE.STATES_PER_SET + i
        w_at = map_of(wk_ptr, first_map + sparse_head * SHAPE.STATES_PER_SET + i, SHAPE)
        size = recall_error(
            k, v, norm, w_at, h_of(page_at, group_at, own, SHAPE),
            s_of(page_at, group_at, own, SHAPE), cols, num_features, SHAPE, PRECISION,
        )  # fmt: skip
        total += size if SHAPE.STATES_PER_SET == 1 else tl.div_rn(size, least)
    if SHAPE.STATES_PER_SET > 1:
        total = total / SHAPE.STATES_PER_SET
    if SHAPE.HAS_SCORE_WEIGHTS:
        total *= weight
    tl.store(scores_at + e, total, mask=ok)


@triton.jit
def score_set(
    wk_ptr, ws_ptr, page_at, group_at, sparse_head, kv_head, own_set, own_kv_head, n, scores_at,
    listed_at, SHAPE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`score_tile` of all candidates but recent ones, which stay whatever their scores are.

    listed `[lam + C]`, scratch: those that are not recent, where there are any.
    """
    lam = num_entries(group_at)
    recent = tl.load(group_at + RECENT_SIZE).to(tl.int32)
    start, stop = window_start(n - SHAPE.UPDATE_INTERVAL, SHAPE), window_start(n, SHAPE)
    count = lam + SHAPE.UPDATE_INTERVAL
    if recent > 0:
        positions_at = part_of(page_at, group_at, POSITIONS, tl.int32) + own_set * lam
        count = list_older(
            positions_at, listed_at, start, stop, lam, recent, SHAPE, BLOCK_A
        )  # fmt: skip
        tl.debug_barrier()  # the list is read by other threads than wrote it
    for first in tl.range(0, count, BLOCK_E, num_stages=1, disable_licm=True):
        index = first + tl.arange(0, BLOCK_E)
        listed = tl.load(listed_at + index, mask=index < tl.where(recent > 0, count, 0), other=0)
        e = tl.where(recent > 0, listed, index)
        ok = (index < count) & candidate_ok(e, start, stop, lam, SHAPE)
        score_tile(
            wk_ptr, ws_ptr, page_at, group_at, sparse_head, kv_head, own_set, own_kv_head, n, e, ok,
            scores_at, SHAPE, PRECISION,
        )  # fmt: skip


@triton.jit
def put(sparse_at, scale_at, exact_at, e, entry, ok, start, lam, cols, SHAPE: tl.constexpr):
    """Keys or values of evicted pairs into their entries. Returns what they stand for there,
    float32.

    Arguments as of `candidates.gather`; e and entry `[M]`.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    x = evicted_rows(exact_at, e, ok, start, lam, cols, SHAPE)
    to = sparse_at + (entry * D)[:, None] + cols[None, :]
    pair_ok = ok[:, None] & (cols < D)[None, :]
    if not SHAPE.INT8_PAIRS:
        tl.store(to, x, mask=pair_ok)
        return x.to(tl.float32)
    else:
        x = x.to(tl.float32)
        scale = int8_scale(x)
        numbers = int8_numbers(x, scale)
        tl.store(to, numbers.to(tl.int8), mask=pair_ok)
        tl.store(scale_at + entry, scale, mask=ok)
        return numbers * scale[:, None]


@triton.jit
def fold_set(
    wk_ptr, ws_ptr, page_at, group_at, sparse_head, kv_head, own_set, own_kv_head, n, scores_at,
    lists_at, SHAPE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_A: tl.constexpr,
    PRECISION: tl.constexpr, kept_at=None,
):  # fmt: skip
    """Choose, fold and replace in a set at an update point. Heads as of `score_tile`.

    Pointers `*_at` but the page's are the set's part of the scratch (`update.Scratch`): scores, and
    lists `[3, C]` of the candidates to fold, the incoming pairs to keep and the free entries.

    kept_at: None, or where H and s of the set's state heads are stored besides.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    F: tl.constexpr = SHAPE.FEATURE_DIM
    C: tl.constexpr = SHAPE.UPDATE_INTERVAL
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    BLOCK_F: tl.constexpr = SHAPE.BLOCK_F
    cols, feats = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    col_ok, feat_ok = cols < D, feats < F
    tile_ok = feat_ok[:, None] & col_ok[None, :]
    lam = num_entries(group_at)
    recent = tl.load(group_at + RECENT_SIZE).to(tl.int32)
    start, stop = window_start(n - C, SHAPE), window_start(n, SHAPE)
    positions_at = part_of(page_at, group_at, POSITIONS, tl.int32) + own_set * lam
    folded_at, new_at, free_at = lists_at, lists_at + C, lists_at + 2 * C
    num_folded, num_new = choose(
        scores_at, positions_at, folded_at, new_at, free_at, start, stop, lam, recent, SHAPE,
        BLOCK_A,
    )  # fmt: skip
    num_folded = tl.where(any_folded(group_at, stop, SHAPE), num_folded, 0)  # or forgotten
    tl.debug_barrier()  # the lists are read by other threads than wrote them

    pairs_at = set_at(page_at, group_at, own_set, own_kv_head, lam, SHAPE)
    first_map = first_key_map(n, SHAPE)
    # Before the first fold H and s are leftovers, and count as zero.
    live = feats < tl.where(start - SHAPE.SINK_SIZE > lam, F, 0)
    # Two halves of the features for each state head, so that a half of H fits registers.
    for half in tl.range(
        0, tl.where(num_folded > 0, 2 * SHAPE.STATES_PER_SET, 0), num_stages=1, disable_licm=True
    ):
        sign = 1.0 - 2.0 * (half % 2)
        w_at = map_of(wk_ptr, first_map + sparse_head * SHAPE.STATES_PER_SET + half // 2, SHAPE)
        w_at = w_at + cols[:, None] * F + feats[None, :]
        w = tl.load(w_at, mask=col_ok[:, None] & feat_ok[None, :], other=0.0)
        own = own_set * SHAPE.STATES_PER_SET + half // 2
        h_at = h_of(page_at, group_at, own, SHAPE) + half % 2 * F * D
        h_at = h_at + feats[:, None] * D + cols[None, :]
        s_at = s_of(page_at, group_at, own, SHAPE) + half % 2 * F + feats
        more_h = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
        more_s = tl.zeros([BLOCK_F], tl.float32)
        for c in tl.range(0, num_folded, BLOCK_E, num_stages=1, disable_licm=True):
            index = c + tl.arange(0, BLOCK_E)
            some = index < num_folded
            which = tl.load(folded_at + index, mask=some, other=0)
            k, v = gather_pairs(pairs_at, which, some, start, lam, cols, SHAPE)
            y = product(k, w, tl.zeros([BLOCK_E, BLOCK_F], tl.float32), PRECISION)
            phi = tl.where(some[:, None], features(y * sign, feat_ok), 0.0)
            more_h = product(tl.trans(phi), v, more_h, PRECISION)
            more_s += tl.sum(phi, 0)
        place = dither(n // C, half % 2 * F + feats)
        h = tl.load(h_at, mask=live[:, None] & col_ok[None, :], other=0.0)
        h = add_dithered(h, more_h, place[:, None])
        tl.store(h_at, h, mask=tile_ok)
        s = tl.load(s_at, mask=live, other=0.0)
        s = add_dithered(s, more_s, place)
        tl.store(s_at, s, mask=feat_ok)
        if kept_at is not None:
            kept_h_at, kept_s_at = kept_at
            to = half * F * D + feats[:, None] * D + cols[None, :]
            tl.store(kept_h_at + to, h, mask=tile_ok)
            tl.store(kept_s_at + half * F + feats, s, mask=feat_ok)

    tl.debug_barrier()  # the folded pairs are read: their entries may go
    k_at, v_at, k_scale_at, v_scale_at, exact_k_at, exact_v_at = pairs_at
    for c in tl.range(0, num_new, BLOCK_E, num_stages=1):
        index = c + tl.arange(0, BLOCK_E)
        some = index < num_new
        which = tl.load(new_at + index, mask=some, other=0)
        entry = tl.load(free_at + index, mask=some, other=0)
        tl.store(positions_at + entry, start + which - lam, mask=some)
        k = put(k_at, k_scale_at, exact_k_at, which, entry, some, start, lam, cols, SHAPE)
        v = put(v_at, v_scale_at, exact_v_at, which, entry, some, start, lam, cols, SHAPE)
        if SHAPE.HAS_SCORE_WEIGHTS:
            w = new_importance(
                ws_ptr, k, v, exact_k_at, which, some, start, lam, kv_head, cols, SHAPE
            )
            weights_at = entries_of(page_at, group_at, SCORE_WEIGHTS, own_set, lam)
            tl.store(weights_at + entry, w, mask=some)
