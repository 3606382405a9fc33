"""Which rows are at an update point, and the pairs that an update chooses among.

Candidate e of a set is sparse slot e while e < lam, else the (e - lam)-th evicted pair.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from lola_vllm.kernels.common import exact_row, read_state, window_start

BLOCK_R = 256  # rows whose token counts are looked at together
RECALL_EPS = tl.constexpr(1e-6)  # as in the reference
INDEX_ARGS = ("slots_ptr", "n_ptr")  # slices of vLLM's buffers: any alignment
COUNT_ARGS = ("first_row", "num_rows")  # vary from call to call: no variant for each


@triton.jit
def due_rows(
    slots_ptr, n_ptr, slots_stride, n_stride, rows, end, least, C: tl.constexpr,
    ETA: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """Which rows are at an update point that leaves more than `least` pairs evicted in all."""
    ok = rows < end
    page = tl.load(slots_ptr + rows.to(tl.int64) * slots_stride, mask=ok, other=0)
    n = tl.load(n_ptr + rows.to(tl.int64) * n_stride, mask=ok, other=0).to(tl.int32)
    start, stop = window_start(n - C, C, ETA, SINK), window_start(n, C, ETA, SINK)
    return (page > 0) & (n % C == 0) & (stop > start) & (stop - SINK > least)


@triton.jit
def nth_row(due, rank, rows, nth):
    """The nth (from 0) of the due rows; rank counts the due rows up to and with each row."""
    return tl.sum(tl.where(due & (rank == nth + 1), rows, 0), 0)


@triton.jit
def candidate_ok(e, start, stop, LAM: tl.constexpr, SINK: tl.constexpr):
    """Which candidates exist: filled slots, and the pairs between the two window starts."""
    return (e < tl.minimum(start - SINK, LAM)) | ((e >= LAM) & (start + e - LAM < stop))


@triton.jit
def gather(
    sparse_ptr, exact_ptr, e, ok, start, group, kv_head, cols, D: tl.constexpr, ETA: tl.constexpr,
    LAM: tl.constexpr, C: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """Keys or values `[len(e), BLOCK_D]` of candidates, zero where not ok. Pointers: the page's."""
    row = exact_row(start + e - LAM, C, ETA, SINK)
    sparse_at = sparse_ptr + (group * LAM + e) * D
    exact_at = exact_ptr + (kv_head * (SINK + ETA + C) + row) * D
    at = tl.where(e < LAM, sparse_at, exact_at)[:, None] + cols[None, :]
    return tl.load(at, mask=ok[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def recall_error(
    k, v, value, w_ptr, h_ptr, s_ptr, cols, num_features, D: tl.constexpr, F: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """v - p `[M, BLOCK_D]`, its length, phi(k) s + 1e-6 and ||phi(k)||^2 `[M]` of one head.

    value: ||v||. Pointers and num_features: as in `read_state`.
    """
    predicted, z, square = read_state(k, w_ptr, h_ptr, s_ptr, cols, num_features, D, F, PRECISION)
    z += RECALL_EPS
    error = v - predicted / z[:, None]
    # Against an empty state the error is the norm, and ratios of the two must tie exactly: so one
    # sum serves both, and they are divided as divisions should round.
    size = tl.where(num_features > 0, tl.sqrt_rn(tl.sum(error * error, 1)), value)
    return error, size, z, square
