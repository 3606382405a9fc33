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
    entries_of,
    exact_of,
    exact_row,
    importance_weights_of,
    int8_numbers,
    int8_scale,
    pairs_of,
    read_state,
    window_start,
)

BLOCK_R = 256  # rows whose token counts are looked at together
INDEX_ARGS = ("state_indices_ptr", "n_ptr")  # slices of vLLM's buffers: any alignment
COUNT_ARGS = ("first_row", "num_rows")  # vary from call to call: no variant for each


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
def candidate_ok(e, start, stop, SHAPE: tl.constexpr):
    """Which candidates exist: filled entries, and the pairs at positions from `start` to `stop`.

    These are the window's starts before and after the update.
    """
    LAM: tl.constexpr = SHAPE.SPARSE_CACHE_SIZE
    return (e < tl.minimum(start - SHAPE.SINK_SIZE, LAM)) | ((e >= LAM) & (start + e - LAM < stop))


@triton.jit
def evicted_rows(exact_at, e, ok, start, kv_head, cols, SHAPE: tl.constexpr):
    """Keys or values `[len(e), BLOCK_D]` of evicted pairs as the window holds them.

    Zero where not ok or e < lam. exact_at: the page's. start: as in `candidate_ok`.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    LAM: tl.constexpr = SHAPE.SPARSE_CACHE_SIZE
    row = exact_row(start + e - LAM, SHAPE)
    at = (exact_of(exact_at, kv_head, SHAPE) + row * D)[:, None] + cols[None, :]
    return tl.load(at, mask=(ok & (e >= LAM))[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def gather(
    sparse_at, scale_at, exact_at, e, ok, start, sparse_head, kv_head, cols, SHAPE: tl.constexpr
):
    """Keys or values `[len(e), BLOCK_D]` of candidates, zero where not ok.

    In their dtype, or where pairs are int8 as what they stand for, in float32. Pointers `*_at` are
    the page's. start: as in `candidate_ok`.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    LAM: tl.constexpr = SHAPE.SPARSE_CACHE_SIZE
    cached = pairs_of(sparse_at, sparse_head, SHAPE) + e * D
    if SHAPE.INT8_PAIRS:
        held = ok & (e < LAM)
        kept = held[:, None] & (cols < D)[None, :]
        numbers = tl.load(cached[:, None] + cols[None, :], mask=kept, other=0).to(tl.float32)
        x = evicted_rows(exact_at, e, ok, start, kv_head, cols, SHAPE).to(tl.float32)
        x += numbers  # one of them is 0
        kept_scale = tl.load(entries_of(scale_at, sparse_head, SHAPE) + e, mask=held, other=0.0)
        scale = tl.where(held, kept_scale, int8_scale(x))
        # Numbers of 8 bits are whole, and stay what they are at a scale of 1.
        return int8_numbers(x, tl.where(held, 1.0, scale)) * scale[:, None]
    else:
        row = exact_row(start + e - LAM, SHAPE)
        evicted = exact_of(exact_at, kv_head, SHAPE) + row * D
        at = tl.where(e < LAM, cached, evicted)[:, None] + cols[None, :]
        return tl.load(at, mask=ok[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def gather_pairs(pairs_at, e, ok, start, sparse_head, kv_head, cols, SHAPE: tl.constexpr):
    """Keys of candidates as `gather` gives them, and values in float32.

    pairs_at: the page's sparse keys, values and their scales, and exact keys and values.
    """
    sparse_k_at, sparse_v_at, k_scale_at, v_scale_at, exact_k_at, exact_v_at = pairs_at
    k = gather(sparse_k_at, k_scale_at, exact_k_at, e, ok, start, sparse_head, kv_head, cols, SHAPE)
    v = gather(sparse_v_at, v_scale_at, exact_v_at, e, ok, start, sparse_head, kv_head, cols, SHAPE)
    return k, v.to(tl.float32)


@triton.jit
def new_importance(ws_ptr, k, v, exact_k_at, e, ok, start, kv_head, cols, SHAPE: tl.constexpr):
    """w `[len(e)]` of evicted pairs from their keys and values (`docs/algorithm.md`, section 6).

    k and v: as `gather_pairs` gives them; the other arguments as of `gather`. A NaN stays one.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    HALF: tl.constexpr = D // 2
    first = cols < HALF  # of a rotary pair; the second entry is HALF columns on
    second = evicted_rows(exact_k_at, e, ok, start, kv_head, cols + HALF, SHAPE).to(tl.float32)
    if SHAPE.INT8_PAIRS:
        whole = evicted_rows(exact_k_at, e, ok, start, kv_head, cols, SHAPE).to(tl.float32)
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
    ws_ptr, score_weights_at, k, v, exact_k_at, e, ok, start, sparse_head, kv_head, cols,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """w `[len(e)]` of candidates: what the page keeps of cached ones; arguments:
    `new_importance`."""
    LAM: tl.constexpr = SHAPE.SPARSE_CACHE_SIZE
    new = new_importance(ws_ptr, k, v, exact_k_at, e, ok, start, kv_head, cols, SHAPE)
    kept_at = entries_of(score_weights_at, sparse_head, SHAPE) + e
    kept = tl.load(kept_at, mask=ok & (e < LAM), other=0.0)
    return tl.where(e < LAM, kept, new)


@triton.jit
def recall_error(
    k, v, value, w_ptr, h_ptr, s_ptr, cols, num_features, SHAPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """v - p `[M, BLOCK_D]`, its length, phi(k) s + 1e-6 and ||phi(k)||^2 `[M]` of one head.

    value: ||v||. Pointers and num_features: as in `read_state`.
    """
    predicted, z, square = read_state(k, w_ptr, h_ptr, s_ptr, cols, num_features, SHAPE, PRECISION)
    z += RECALL_EPS
    error = v - predicted / z[:, None]
    # Against an empty state the error is the norm, and ratios of the two must tie exactly: so one
    # sum serves both, and they are divided as divisions should round.
    size = tl.where(num_features > 0, tl.sqrt_rn(tl.sum(error * error, 1)), value)
    return error, size, z, square
