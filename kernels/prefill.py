"""Prefill in Triton (LoLA, arXiv 2505.23666): segments of new tokens, an update interval at a time.

The host cuts every row at its update points (the grid is absolute, so any split of a prompt cuts
alike) from counts it holds, without waiting for the device. Chunk i of all rows is one step: one
attend launch, then the update kernels. Within a chunk the window's start, the sparse cache and the
hidden state stand still, so its queries differ only in how much of the chunk itself they see.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from lola_vllm.kernels.common import (
    MIN_DOT,
    absorb,
    absorb_cached,
    entries_of,
    exact_of,
    exact_row,
    h_of,
    map_of,
    mix,
    page_shape,
    page_strides,
    pairs_of,
    pairs_per_tile,
    precision,
    read_state,
    s_of,
    window_start,
)
from lola_vllm.kernels.update import Rows, scratch_buffers, update
from lola_vllm.ops.contract import HeadGroup, PrefillBatch
from lola_vllm.state import StateLayout

MAX_BLOCK_M = 32  # queries per program; 64 spill registers on sm_80 at d = 128
NUM_WARPS = 4

Ints = npt.NDArray[np.int64]

# Attends every token to its chunk, window and sinks: (state, q, k, v, batch) -> output
# `[T, Hq, d]`, contiguous, and its log-sum-exp `[Hq, T]` float32, whose rows are contiguous.
SoftmaxPart = Callable[[HeadGroup, Tensor, Tensor, Tensor, PrefillBatch], tuple[Tensor, Tensor]]


@triton.jit(do_not_specialize=("lse_head", "first_chunk", "num_blocks", "num_chunks"))
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    wq_ptr,
    gate_ptr,
    h_ptr,
    s_ptr,
    sparse_k_ptr,
    sparse_v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    exact_k_ptr,
    exact_v_ptr,
    state_indices_ptr,
    chunks_ptr,
    soft_ptr,
    lse_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    state_page,
    kv_page,
    sparse_page,
    words_page,
    lse_head,
    first_chunk,
    num_blocks,
    num_chunks,
    scale,
    SHAPE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MAX: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend a block of queries of one chunk and query head, and write the block's pairs.

    Grid (chunks of the step * num_blocks, Hq). chunks `[3, num_chunks]` int32: first token in the
    batch, its position, tokens. PARTIAL: soft and lse hold a `SoftmaxPart`'s results, and only the
    sparse cache and the hidden state are left to add; else neither is read.
    """
    tl.static_assert(not (PARTIAL and SUBTRACT_MAX))  # a log-sum-exp does not tell the maximum
    D: tl.constexpr = SHAPE.HEAD_DIM
    LAM: tl.constexpr = SHAPE.SPARSE_CACHE_SIZE
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    chunk = first_chunk + tl.program_id(0) // num_blocks
    head = tl.program_id(1)
    kv_head, state_head = (
        head // (NUM_HEADS // SHAPE.NUM_KV_HEADS),
        head // (NUM_HEADS // SHAPE.NUM_STATE_HEADS),
    )
    token = tl.load(chunks_ptr + chunk).to(tl.int64)
    position = tl.load(chunks_ptr + num_chunks + chunk)
    length = tl.load(chunks_ptr + 2 * num_chunks + chunk)
    m0 = tl.program_id(0) % num_blocks * BLOCK_M
    if m0 >= length:
        return
    queries = m0 + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    query_ok, col_ok = queries < length, cols < D
    q_ok = query_ok[:, None] & col_ok[None, :]
    tokens = token + queries
    out_at = out_ptr + head * out_head + tokens[:, None] * out_token + cols[None, :]
    page = tl.load(state_indices_ptr + chunk).to(tl.int64)
    if page <= 0:
        zero = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        tl.store(out_at, zero.to(out_ptr.dtype.element_ty), mask=q_ok)
        return

    kv_type = exact_k_ptr.dtype.element_ty
    q_at = q_ptr + head * q_head + tokens[:, None] * q_token + cols[None, :]
    q = tl.load(q_at, mask=q_ok, other=0.0)
    k_at, v_at = k_ptr + kv_head * k_head, v_ptr + kv_head * v_head
    exact_k_at = exact_of(exact_k_ptr + page * kv_page, kv_head, SHAPE)
    exact_v_at = exact_of(exact_v_ptr + page * kv_page, kv_head, SHAPE)
    if head % (NUM_HEADS // SHAPE.NUM_KV_HEADS) == 0:
        # No program of this launch reads these rows: the ring has room for window and chunk.
        k = tl.load(k_at + tokens[:, None] * k_token + cols[None, :], mask=q_ok, other=0.0)
        v = tl.load(v_at + tokens[:, None] * v_token + cols[None, :], mask=q_ok, other=0.0)
        to = exact_row(position + queries, SHAPE)[:, None] * D + cols[None, :]
        tl.store(exact_k_at + to, k.to(kv_type), mask=q_ok)
        tl.store(exact_v_at + to, v.to(kv_type), mask=q_ok)

    first = window_start(position, SHAPE)
    if PARTIAL:
        m = tl.load(lse_ptr + head * lse_head + tokens, mask=query_ok, other=0.0)
        norm = tl.full([BLOCK_M], 1.0, tl.float32)
        soft_at = soft_ptr + (tokens[:, None] * NUM_HEADS + head) * D + cols[None, :]
        acc = tl.load(soft_at, mask=q_ok, other=0.0).to(tl.float32)
    else:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

        # The chunk itself, causal. Its first tile holds its first pair, which every query sees.
        for j in range(0, tl.minimum(length, m0 + BLOCK_M), BLOCK_N):
            index = j + tl.arange(0, BLOCK_N)
            ok = (index[None, :] <= queries[:, None]) & (index < length)[None, :]
            tile_ok = (index < length)[:, None] & col_ok[None, :]
            at = (token + index)[:, None]
            k = tl.load(k_at + at * k_token + cols[None, :], mask=tile_ok, other=0.0).to(kv_type)
            v = tl.load(v_at + at * v_token + cols[None, :], mask=tile_ok, other=0.0).to(kv_type)
            m, norm, acc = absorb(q, k, v, ok, scale, m, norm, acc, PRECISION)

        # Sinks and window from before the chunk: every query sees them all.
        num_sinks = tl.minimum(position, SHAPE.SINK_SIZE)
        num_exact = num_sinks + tl.maximum(position - first, 0)
        for j in range(0, num_exact, BLOCK_N):
            index = j + tl.arange(0, BLOCK_N)
            ok = index < num_exact
            at = tl.where(index < num_sinks, index, first + index - num_sinks)
            at = exact_row(at, SHAPE)[:, None] * D + cols[None, :]
            tile_ok = ok[:, None] & col_ok[None, :]
            k = tl.load(exact_k_at + at, mask=tile_ok, other=0.0)
            v = tl.load(exact_v_at + at, mask=tile_ok, other=0.0)
            m, norm, acc = absorb(q, k, v, ok[None, :], scale, m, norm, acc, PRECISION)

    if LAM > 0:
        sparse_head = head // (NUM_HEADS // SHAPE.NUM_SPARSE_HEADS)
        num_sparse = tl.minimum(first - SHAPE.SINK_SIZE, LAM)
        sparse_k_at = pairs_of(sparse_k_ptr + page * sparse_page, sparse_head, SHAPE)
        sparse_v_at = pairs_of(sparse_v_ptr + page * sparse_page, sparse_head, SHAPE)
        k_scale_at = entries_of(k_scale_ptr + page * words_page, sparse_head, SHAPE)
        v_scale_at = entries_of(v_scale_ptr + page * words_page, sparse_head, SHAPE)
        for j in range(0, num_sparse, BLOCK_N):
            index = j + tl.arange(0, BLOCK_N)
            ok = index < num_sparse
            m, norm, acc = absorb_cached(
                q, sparse_k_at, sparse_v_at, k_scale_at, v_scale_at, index, ok, cols, scale, m,
                norm, acc, kv_type, SHAPE, PRECISION,
            )  # fmt: skip

    y = acc / norm[:, None]
    if first - SHAPE.SINK_SIZE > LAM:  # something was folded in before this chunk
        y_lin, z, _ = read_state(
            q, map_of(wq_ptr, head, SHAPE), h_of(h_ptr + page * state_page, state_head, SHAPE),
            s_of(s_ptr + page * state_page, state_head, SHAPE), cols, SHAPE.FEATURE_DIM, SHAPE,
            PRECISION,
        )  # fmt: skip
        log_gate = tl.load(gate_ptr + head).to(tl.float32)
        y = mix(m, norm, y, y_lin / z[:, None], tl.log(z), log_gate, SUBTRACT_MAX)
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=q_ok)


@dataclass(frozen=True)
class Step:
    """A range of the plan's chunks, one per row that still has some.

    Attributes:
        first, count: the range. longest: tokens of its longest chunk.
        update: some row reaches an update point. score: some row's cache overflows there.
    """

    first: int
    count: int
    longest: int
    update: bool
    score: bool


@dataclass(frozen=True)
class Plan:
    """Chunks of a ragged batch, ordered by step.

    Attributes:
        chunks: `[5, P]`: first token in the batch, its position, tokens, tokens seen after the
            chunk, row.
        steps: launches, in order.
    """

    chunks: Ints
    steps: list[Step]


def plan_chunks(query_start_loc: Ints, context_lens: Ints, layout: StateLayout) -> Plan:
    """Cut a ragged batch at its update points.

    Args:
        query_start_loc: `[R + 1]`. context_lens: `[R]`.

    A chunk ends at the next update point that evicts something, so a prompt's first chunk may span
    several intervals; sinks, window and chunk together always fit the exact store.
    """
    eta, C, sink = layout.window_size, layout.update_interval, layout.sink_size
    lengths = np.diff(query_start_loc)
    ends = context_lens + lengths
    first_due = -(-(eta + sink + 1) // C) * C  # no earlier point evicts
    due = np.maximum((context_lens // C + 1) * C, first_due)
    counts = np.where(lengths > 0, 1 + np.maximum(-(-(ends - due) // C), 0), 0)

    rows = np.repeat(np.arange(len(lengths)), counts)
    step = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.argsort(step, kind="stable")
    rows, step = rows[order], step[order]
    starts = np.where(step == 0, context_lens[rows], due[rows] + (step - 1) * C)
    stops = np.minimum(ends[rows], due[rows] + step * C)
    tokens = query_start_loc[rows] + starts - context_lens[rows]
    chunks = np.stack([tokens, starts, stops - starts, stops, rows])

    sizes = np.bincount(step) if len(step) else np.zeros(0, np.int64)
    firsts = np.cumsum(sizes) - sizes
    update_here = (stops % C == 0) & (stops >= first_due)
    overflow = update_here & (stops - eta - sink > layout.sparse_cache_size)
    steps = [
        Step(
            int(first),
            int(size),
            int(chunks[2, first : first + size].max()),
            bool(update_here[first : first + size].any()),
            bool(overflow[first : first + size].any()),
        )
        for first, size in zip(firsts, sizes, strict=True)
    ]
    return Plan(chunks, steps)


def prefill(
    group: HeadGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: PrefillBatch,
    out: Tensor,
    softmax: SoftmaxPart | None = None,
) -> None:
    """A segment of new tokens per row, its arguments checked; shapes as in `contract.PrefillOp`.

    Args:
        softmax: what attends chunk, window and sinks, for weights without `subtract_max`; None:
            the steps' own kernel.
    """
    layout, views, weights = group.layout, group.views, group.weights
    steps, chunks = _plan_on(
        q.device,
        layout,
        batch.query_start_loc.numpy().astype(np.int64).tobytes(),
        batch.context_lens.numpy().astype(np.int64).tobytes(),
    )
    if not steps:
        return
    n, page = chunks[3], batch.state_indices.index_select(0, chunks[4])

    d, Hq = q.shape[-1], q.shape[1]
    strides = page_strides(group)
    own = prefill_constants(layout, Hq, weights.subtract_max, softmax is not None)
    if softmax is None:
        soft, lse, lse_head = out, weights.log_gate, 0  # not read
    else:  # before the first step: it writes into the ring
        soft, lse = softmax(group, q, k, v, batch)
        lse_head = lse.stride(0)
    scratch = scratch_buffers(layout, max(step.count for step in steps), q.device)
    for step in steps:
        num_blocks = triton.cdiv(step.longest, block_m(layout))
        prefill_kernel[(step.count * num_blocks, Hq)](
            q, k, v, out, weights.feature_map_q, weights.log_gate,
            views.H, views.s, views.sparse_k, views.sparse_v, views.sparse_k_scale,
            views.sparse_v_scale, views.exact_k, views.exact_v,
            page, chunks, soft, lse,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            out.stride(0), out.stride(1), strides.state, strides.kv, strides.sparse,
            strides.words, lse_head,
            step.first, num_blocks, chunks.shape[1], d**-0.5, **own,
            PRECISION=precision(q.dtype), num_warps=NUM_WARPS,
        )  # fmt: skip
        if step.update:
            update(group, Rows(page, n, step.first, step.count), scratch, step.score)


def block_m(layout: StateLayout) -> int:
    """Queries per program: as many as a chunk has that spans an update interval, within limits."""
    return min(MAX_BLOCK_M, max(MIN_DOT, triton.next_power_of_2(layout.update_interval)))


def prefill_constants(
    layout: StateLayout, Hq: int, subtract_max: bool, partial: bool
) -> dict[str, object]:
    """`prefill_kernel`'s compile-time arguments, all but PRECISION."""
    return {
        "SHAPE": page_shape(layout),
        "NUM_HEADS": Hq,
        "BLOCK_M": block_m(layout),
        "BLOCK_N": pairs_per_tile(layout),
        "SUBTRACT_MAX": subtract_max,
        "PARTIAL": partial,
    }


@functools.lru_cache(maxsize=4)
def _plan_on(
    device: torch.device, layout: StateLayout, query_start_loc: bytes, context_lens: bytes
) -> tuple[list[Step], Tensor]:
    """The plan's steps and its chunks on a device, made once for all layers of a model's step."""
    plan = plan_chunks(
        np.frombuffer(query_start_loc, np.int64), np.frombuffer(context_lens, np.int64), layout
    )
    return plan.steps, on_device(plan.chunks.astype(np.int32), device)


def on_device(array: npt.NDArray[np.integer], device: torch.device) -> Tensor:
    """A copy of an array, made without waiting for the device."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # only pinned memory is copied without waiting
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor
