"""Which rows are at an update point, and the pairs that an update chooses among.

Candidate e of a set is sparse entry e while e < lam, else the (e - lam)-th evicted pair.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from lola_vllm.kernels.common import (
    MAX_LOG_IMPORTANCE,
    RECALL_EPS,
    int8_numbers,
    int8_scale,
    read_state,
)
from lola_vllm.kernels.layer import (
    EXACT_K,
    EXACT_V,
    SPARSE_K,
    SPARSE_K_SCALE,
    SPARSE_V,
    SPARSE_V_SCALE,
    entries_of,
    exact_of,
    exact_row,
    group_of,
    importance_weights_of,
    pairs_of,
    window_start,
)

BLOCK_R = 256  # rows whose token counts are looked at together
INDEX_ARGS = ("state_indices_ptr", "n_ptr")  # slices of vLLM's buffers: any alignment
# Numbers that vary from layer to layer and from call to call: no variant for each.
COUNT_ARGS = (
    "num_rows", "most", "least", "blocks", "splits", "state_indices_stride", "n_stride",
)  # fmt: skip


@triton.jit
def due_rows(
    state_indices_ptr, n_ptr, state_indices_stride, n_stride, rows, end, least, SHAPE: tl.constexpr
):
    """Which rows are at an update point that leaves more than `least` pairs evicted in all."""
    C: tl.constexpr = SHAPE.UPDATE_INTERVAL
    ok = rows < end
    page = tl.load(state_indices_ptr + rows.to(tl.int64) * state_indices_stride, mask=ok, other=0)
    n = tl.load(n_ptr + rows.to(tl.int64) * n_stride, mask=ok, other=0).to(tl.int32)
    start, stop = window_start(n - C, SHAPE), window_start(n, SHAPE)
    return (page > 0) & (n % C == 0) & (stop > start) & (stop - SHAPE.SINK_SIZE > least)


@triton.jit
def nth_row(due, rank, rows, nth):
    """The nth (from 0) of the due rows; rank counts the due rows up to and with each row."""
    return tl.sum(tl.where(due & (rank == nth + 1), rows, 0), 0)


@triton.jit
def set_of(table_ptr, sparse_head, SHAPE: tl.constexpr):
    """Where a sparse set of the layer is: its group's row of the table, its KV head in the layer,
    and its KV head and itself in the group."""
    kv_head = sparse_head // SHAPE.SETS_PER_KV_HEAD
    group_at, own_kv_head = group_of(table_ptr, kv_head)
    own_set = own_kv_head * SHAPE.SETS_PER_KV_HEAD + sparse_head % SHAPE.SETS_PER_KV_HEAD
    return group_at, kv_head, own_kv_head, own_set


@triton.jit
def set_at(page_at, group_at, sparse_head, kv_head, lam, SHAPE: tl.constexpr):
    """Where a set's keys, values and their scales are, and the exact keys and values of its KV
    head. Heads are counted in their group."""
    return (
        pairs_of(page_at, group_at, SPARSE_K, sparse_head, lam, SHAPE),
        pairs_of(page_at, group_at, SPARSE_V, sparse_head, lam, SHAPE),
        entries_of(page_at, group_at, SPARSE_K_SCALE, sparse_head, lam),
        entries_of(page_at, group_at, SPARSE_V_SCALE, sparse_head, lam),
        exact_of(page_at, group_at, EXACT_K, kv_head, SHAPE),
        exact_of(page_at, group_at, EXACT_V, kv_head, SHAPE),
    )


@triton.jit
def candidate_ok(e, start, stop, lam, SHAPE: tl.constexpr):
    """Which candidates exist: filled entries, and the pairs at positions from `start` to `stop`.

    These are the window's starts before and after the update.
    """
    return (e < tl.minimum(start - SHAPE.SINK_SIZE, lam)) | ((e >= lam) & (start + e - lam < stop))


@triton.jit
def position_of(positions_at, e, start, stop, lam, SHAPE: tl.constexpr):
    """Which candidates e exist, and their positions. positions_at: of the set's entries."""
    ok = (e < lam + SHAPE.UPDATE_INTERVAL) & candidate_ok(e, start, stop, lam, SHAPE)
    held = tl.load(positions_at + e, mask=ok & (e < lam), other=0)
    return ok, tl.where(e < lam, held, start + e - lam)


@triton.jit
def evicted_rows(exact_at, e, ok, start, lam, cols, SHAPE: tl.constexpr):
    """Keys or values `[len(e), BLOCK_D]` of evicted pairs as the window holds them.

    Zero where not ok or e < lam. exact_at: the KV head's. start: as in `candidate_ok`.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    row = exact_row(start + e - lam, SHAPE)
    at = exact_at + (row * D)[:, None] + cols[None, :]
    return tl.load(at, mask=(ok & (e >= lam))[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def gather(sparse_at, scale_at, exact_at, e, ok, start, lam, cols, SHAPE: tl.constexpr):
    """Keys or values `[len(e), BLOCK_D]` of candidates, zero where not ok.

    In their dtype, or where pairs are int8 as what they stand for, in float32. Pointers `*_at` are
    the set's. start: as in `candidate_ok`.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    cached = sparse_at + e * D
    if SHAPE.INT8_PAIRS:
        held = ok & (e < lam)
        kept = held[:, None] & (cols < D)[None, :]
        numbers = tl.load(cached[:, None] + cols[None, :], mask=kept, other=0).to(tl.float32)
        x = evicted_rows(exact_at, e, ok, start, lam, cols, SHAPE).to(tl.float32)
        x += numbers  # one of them is 0
        kept_scale = tl.load(scale_at + e, mask=held, other=0.0)
        scale = tl.where(held, kept_scale, int8_scale(x))
        # Numbers of 8 bits are whole, and stay what they are at a scale of 1.
        return int8_numbers(x, tl.where(held, 1.0, scale)) * scale[:, None]
    else:
        evicted = exact_at + exact_row(start + e - lam, SHAPE) * D
        at = tl.where(e < lam, cached, evicted)[:, None] + cols[None, :]
        return tl.load(at, mask=ok[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def gather_pairs(pairs_at, e, ok, start, lam, cols, SHAPE: tl.constexpr):
    """Keys of candidates as `gather` gives them, and values in float32; pairs_at: of `set_at`."""
    k_at, v_at, k_scale_at, v_scale_at, exact_k_at, exact_v_at = pairs_at
    k = gather(k_at, k_scale_at, exact_k_at, e, ok, start, lam, cols, SHAPE)
    v = gather(v_at, v_scale_at, exact_v_at, e, ok, start, lam, cols, SHAPE)
    return k, v.to(tl.float32)


@triton.jit
def new_importance(ws_ptr, k, v, exact_k_at, e, ok, start, lam, kv_head, cols, SHAPE: tl.constexpr):
    """w `[len(e)]` of evicted pairs from their keys and values (`docs/algorithm.md`, section 6).

    k and v: as `gather_pairs` gives them; kv_head: of the layer; the other arguments as of
    `gather`. A NaN stays one.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    HALF: tl.constexpr = D // 2
    first = cols < HALF  # of a rotary pair; the second entry is HALF columns on
    second = evicted_rows(exact_k_at, e, ok, start, lam, cols + HALF, SHAPE).to(tl.float32)
    if SHAPE.INT8_PAIRS:
        whole = evicted_rows(exact_k_at, e, ok, start, lam, cols, SHAPE).to(tl.float32)
        scale = int8_scale(whole)
        second = int8_numbers(second, scale) * scale[:, None]
    k = k.to(tl.float32)
    weights = importance_weights_of(ws_ptr, kv_head, SHAPE)
    a = tl.load(weights + cols, mask=first, other=0.0)
    b = tl.load(weights + HALF + cols, mask=cols < D, other=0.0)
    rho = tl.where(first[None, :], tl.sqrt_rn(k * k + second * second), 0.0)
    log = tl.sum(a[None, :] * rho + b[None, :] * v, 1) + tl.load(weights + HALF + D)
    log = tl.where(log > MAX_LOG_IMPORTANCE, MAX_LOG_IMPORTANCE, log)
    return tl.exp(tl.where(log < -MAX_LOG_IMPORTANCE, -MAX_LOG_IMPORTANCE, log))


@triton.jit
def candidate_importance(
    ws_ptr, weights_at, k, v, exact_k_at, e, ok, start, lam, kv_head, cols, SHAPE: tl.constexpr
):
    """w `[len(e)]` of candidates: what the page keeps of cached ones, at `weights_at`; arguments:
    `new_importance`."""
    new = new_importance(ws_ptr, k, v, exact_k_at, e, ok, start, lam, kv_head, cols, SHAPE)
    kept = tl.load(weights_at + e, mask=ok & (e < lam), other=0.0)
    return tl.where(e < lam, kept, new)


@triton.jit
def recall_error(
    k, v, value, w_ptr, h_ptr, s_ptr, cols, num_features, SHAPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """||v - p|| `[M]` of one head.

    value: ||v||. Pointers and num_features: as in `read_state`.
    """
    predicted, z = read_state(k, w_ptr, h_ptr, s_ptr, cols, num_features, SHAPE, PRECISION)
    error = v - predicted / (z + RECALL_EPS)[:, None]
    # Against an empty state the error is the norm, and ratios of the two must tie exactly: so one
    # sum serves both, and they are divided as divisions should round.
    return tl.where(num_features > 0, tl.sqrt_rn(tl.sum(error * error, 1)), value)
