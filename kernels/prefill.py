"""Prefill in Triton (LoLA, arXiv 2505.23666): segments of new tokens, in one launch or two.

A program takes a KV head of a row through the row's tokens, an update interval at a time: it
attends a chunk's queries, writes the chunk's pairs, scores, selects and folds, and goes on with the
next chunk. Where rows are few it attends none: `attend.py` does, in a launch after this one. The
grid of update points is absolute, so any split of a prompt cuts alike.

A page's parts are read by other threads than wrote them. Only the program itself writes what it
reads, as KV heads do not see each other, so a barrier of its threads orders the two: it makes what
they wrote to global memory visible to each other.

Loops around the phases of a chunk hoist nothing (`disable_licm`): what one phase hoists would keep
registers from all others, which spill then.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from lola_vllm.core.ops.contract import LayerState, PrefillBatch
from lola_vllm.core.state import LayerLayout
from lola_vllm.kernels.attend import NUM_WARPS as ATTEND_WARPS
from lola_vllm.kernels.attend import (
    Kept,
    attend_block,
    attend_kernel,
    attends_apart,
    kept_buffers,
    num_chunks,
    tile_of,
)
from lola_vllm.kernels.fold import fold_set, score_set
from lola_vllm.kernels.layer import (
    EXACT_K,
    EXACT_V,
    POSITIONS,
    exact_of,
    exact_row,
    group_of,
    layer_shape,
    num_entries,
    pairs_per_tile,
    part_of,
    precision,
    window_start,
)
from lola_vllm.kernels.update import PRECISION as UPDATE_PRECISION
from lola_vllm.kernels.update import fold_constants, score_block, scratch_buffers

NUM_WARPS = 8  # four would spill registers in updates at d = 128

# Attends every token to its chunk, window and sinks: (layer, q, k, v, batch) -> output
# `[T, Hq, d]`, contiguous, and its log-sum-exp `[Hq, T]` float32, whose rows are contiguous.
SoftmaxPart = Callable[[LayerState, Tensor, Tensor, Tensor, PrefillBatch], tuple[Tensor, Tensor]]


@triton.jit
def write_pairs(k_at, v_at, exact_k_at, exact_v_at, position, length, m0, k_token, v_token,
                SHAPE: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Keep keys and values of a chunk from its m0-th token on; arguments as of `attend_block`."""
    index, cols = m0 + tl.arange(0, BLOCK_M), tl.arange(0, SHAPE.BLOCK_D)
    ok = (index < length)[:, None] & (cols < SHAPE.HEAD_DIM)[None, :]
    k = tl.load(k_at + index[:, None] * k_token + cols[None, :], mask=ok, other=0.0)
    v = tl.load(v_at + index[:, None] * v_token + cols[None, :], mask=ok, other=0.0)
    to = exact_row(position + index, SHAPE)[:, None] * SHAPE.HEAD_DIM + cols[None, :]
    tl.store(exact_k_at + to, k.to(SHAPE.KV_TYPE), mask=ok)
    tl.store(exact_v_at + to, v.to(SHAPE.KV_TYPE), mask=ok)


@triton.jit
def keep_positions(
    page_at, group_at, own_set, position, to, SHAPE: tl.constexpr, BLOCK_A: tl.constexpr
):
    """Copy the positions of a set's entries as a chunk that begins at the position finds them."""
    lam = num_entries(group_at)
    num_sparse = tl.minimum(window_start(position, SHAPE) - SHAPE.SINK_SIZE, lam)
    positions_at = part_of(page_at, group_at, POSITIONS, tl.int32) + own_set * lam
    for base in tl.range(0, num_sparse, BLOCK_A, num_stages=1):
        e = base + tl.arange(0, BLOCK_A)
        tl.store(to + e, tl.load(positions_at + e, mask=e < num_sparse), mask=e < num_sparse)


@triton.jit(
    do_not_specialize=("lse_head", "num_rows", "most", "per_row", "state_indices_stride"),
    do_not_specialize_on_alignment=("state_indices_ptr",),
)
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    wq_ptr,
    gate_ptr,
    wk_ptr,
    ws_ptr,
    pages_ptr,
    table_ptr,
    state_indices_ptr,
    rows_ptr,
    soft_ptr,
    lse_ptr,
    scores_ptr,
    lists_ptr,
    listed_ptr,
    kept_h_ptr,
    kept_s_ptr,
    kept_positions_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    page_stride,
    state_indices_stride,
    lse_head,
    num_rows,
    most,
    per_row,
    scale,
    SHAPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MAX: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE_BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
    UPDATE_PRECISION: tl.constexpr,
    APART: tl.constexpr,
):
    """Grid (num_rows * Hkv,). rows: of `rows_on`. Scratch as of updates of so many rows.

    PARTIAL: soft and lse hold a `SoftmaxPart`'s results, and only the sparse cache and the hidden
    state are left to add; else neither is read. most: entries of the largest set. BLOCK_M and
    TILE_HEADS: of `tile_of`. SCORE_BLOCK: candidates scored at a time; BLOCK_E and BLOCK_A as in
    `update.fold_kernel`.

    APART: nothing is attended, and kept, of `attend.Kept` with per_row chunks for each row, is
    written. Else it is not used.
    """
    tl.static_assert(not (PARTIAL and SUBTRACT_MAX))  # a log-sum-exp does not tell the maximum
    D: tl.constexpr = SHAPE.HEAD_DIM
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    C: tl.constexpr = SHAPE.UPDATE_INTERVAL
    HEADS: tl.constexpr = SHAPE.NUM_HEADS // SHAPE.NUM_KV_HEADS
    TOKENS: tl.constexpr = BLOCK_M // TILE_HEADS
    HEADS_OF_STATE: tl.constexpr = SHAPE.NUM_HEADS // SHAPE.NUM_STATE_HEADS
    TILES: tl.constexpr = (HEADS_OF_STATE + TILE_HEADS - 1) // TILE_HEADS
    # The first update point that evicts a pair.
    FIRST_DUE: tl.constexpr = (SHAPE.WINDOW_SIZE + SHAPE.SINK_SIZE + C) // C * C
    row, kv_head = tl.program_id(0) // SHAPE.NUM_KV_HEADS, tl.program_id(0) % SHAPE.NUM_KV_HEADS
    token = tl.load(rows_ptr + row).to(tl.int64)
    position = tl.load(rows_ptr + num_rows + row)
    end = position + tl.load(rows_ptr + 2 * num_rows + row)
    nth = tl.load(rows_ptr + 3 * num_rows + row).to(tl.int64)
    page = tl.load(state_indices_ptr + nth * state_indices_stride).to(tl.int64)
    if page <= 0:
        cols = tl.arange(0, BLOCK_D)
        zero = tl.zeros([BLOCK_M, BLOCK_D], tl.float32).to(out_ptr.dtype.element_ty)
        for m0 in tl.range(0, end - position, BLOCK_M, num_stages=1, disable_licm=True):
            tokens = m0 + tl.arange(0, BLOCK_M)
            ok = (tokens < end - position)[:, None] & (cols < D)[None, :]
            at = (token + tokens)[:, None] * out_token + cols[None, :]
            for i in range(HEADS):
                tl.store(out_ptr + (kv_head * HEADS + i) * out_head + at, zero, mask=ok)
        return

    group_at, own_kv_head = group_of(table_ptr, kv_head)
    lam = num_entries(group_at)
    page_at = pages_ptr + page * page_stride
    exact_k_at = exact_of(page_at, group_at, EXACT_K, own_kv_head, SHAPE)
    exact_v_at = exact_of(page_at, group_at, EXACT_V, own_kv_head, SHAPE)
    while tl.condition(position < end, disable_licm=True):
        stop = tl.minimum(tl.maximum(position // C * C + C, FIRST_DUE), end)
        length = stop - position
        k_at, v_at = k_ptr + kv_head * k_head + token * k_token, v_ptr + kv_head * v_head
        v_at += token * v_token
        if APART:
            chunk = row.to(tl.int64) * per_row
            chunk += tl.where(position == 0, 0, (position - FIRST_DUE) // C + 1)
            kept_at = kept_positions_ptr + (chunk * SHAPE.NUM_SPARSE_HEADS) * most
            for i in tl.range(0, SHAPE.SETS_PER_KV_HEAD, num_stages=1, disable_licm=True):
                keep_positions(
                    page_at, group_at, own_kv_head * SHAPE.SETS_PER_KV_HEAD + i, position,
                    kept_at + (kv_head * SHAPE.SETS_PER_KV_HEAD + i) * most, SHAPE, BLOCK_A,
                )  # fmt: skip
        for m0 in tl.range(0, length, TOKENS, num_stages=1, disable_licm=True):
            # The ring has room for window and chunk, so attending reads none of these rows.
            write_pairs(
                k_at, v_at, exact_k_at, exact_v_at, position, length, m0, k_token, v_token, SHAPE,
                TOKENS,
            )  # fmt: skip
            if not APART:
                for i in tl.range(
                    0, HEADS // HEADS_OF_STATE * TILES, num_stages=1, disable_licm=True
                ):  # fmt: skip
                    of_state = i % TILES * TILE_HEADS
                    head = kv_head * HEADS + i // TILES * HEADS_OF_STATE + of_state
                    attend_block(
                        q_ptr + head * q_head + token * q_token,
                        out_ptr + head * out_head + token * out_token,
                        soft_ptr + (token * SHAPE.NUM_HEADS + head) * D,
                        lse_ptr + head * lse_head + token, k_at, v_at, wq_ptr, gate_ptr, page_at,
                        group_at, head, tl.minimum(HEADS_OF_STATE - of_state, TILE_HEADS),
                        own_kv_head, position, length, m0, q_token, q_head, k_token, v_token,
                        out_token, out_head, lse_head, scale, SHAPE, BLOCK_M, TILE_HEADS, BLOCK_N,
                        SUBTRACT_MAX, HAS_SINKS, PARTIAL, PRECISION,
                    )  # fmt: skip
        if (stop % C == 0) & (stop >= FIRST_DUE):
            tl.debug_barrier()  # the page is read, and the chunk's pairs are written
            for i in tl.range(0, SHAPE.SETS_PER_KV_HEAD, num_stages=1, disable_licm=True):
                sparse_head = kv_head * SHAPE.SETS_PER_KV_HEAD + i
                own_set = own_kv_head * SHAPE.SETS_PER_KV_HEAD + i
                scratch = (row * SHAPE.NUM_SPARSE_HEADS + sparse_head).to(tl.int64)
                scores_at = scores_ptr + scratch * (most + C)
                overflow = window_start(stop, SHAPE) - SHAPE.SINK_SIZE > lam
                if overflow & (lam > 0):
                    score_set(
                        wk_ptr, ws_ptr, page_at, group_at, sparse_head, kv_head, own_set,
                        own_kv_head, stop, scores_at, listed_ptr + scratch * (most + C), SHAPE,
                        SCORE_BLOCK, BLOCK_A, UPDATE_PRECISION,
                    )  # fmt: skip
                tl.debug_barrier()  # scores are read by other threads than wrote them
                if APART:  # what the next chunk meets
                    chunk = row.to(tl.int64) * per_row + (stop - FIRST_DUE) // C + 1
                    state = chunk * SHAPE.NUM_STATE_HEADS + sparse_head * SHAPE.STATES_PER_SET
                    kept_s_at = kept_s_ptr + state * 2 * SHAPE.FEATURE_DIM
                    kept_states_at = (kept_h_ptr + state * 2 * SHAPE.FEATURE_DIM * D, kept_s_at)
                else:
                    kept_states_at: tl.constexpr = None  # type: ignore[no-redef]
                fold_set(
                    wk_ptr, ws_ptr, page_at, group_at, sparse_head, kv_head, own_set, own_kv_head,
                    stop, scores_at, lists_ptr + scratch * 3 * C, SHAPE, BLOCK_E, BLOCK_A,
                    UPDATE_PRECISION, kept_states_at,
                )  # fmt: skip
        tl.debug_barrier()  # what the next chunk reads is written, and what it overwrites is read
        token += length
        position = stop


def prefill(
    layer: LayerState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: PrefillBatch,
    out: Tensor,
    softmax: SoftmaxPart | None = None,
    apart: bool | None = None,
) -> None:
    """A segment of new tokens per row, its arguments checked; shapes as in `contract.PrefillOp`.

    Args:
        softmax: what attends chunk, window and sinks where the kernel else does, for weights
            without `subtract_max`. apart: rows from their first tokens on are attended in a launch
            of its own; None: where they are few (`attend.attends_apart`).
    """
    layout, weights, pages = layer.layout, layer.weights, layer.pages
    starts = batch.query_start_loc.numpy().astype(np.int64)
    contexts = batch.context_lens.numpy().astype(np.int64)
    rows = rows_on(q.device, starts.tobytes(), contexts.tobytes())
    num_rows = rows.shape[1]
    if not num_rows:
        return
    d, Hq, state_indices = q.shape[-1], q.shape[1], batch.state_indices
    chunks = num_chunks(layout.pages[0], int(np.diff(starts).max()))
    if contexts.any():
        apart = False
    elif apart is None:
        apart = attends_apart(layout, num_rows, chunks, q.device)
    if apart:
        softmax = None
    if softmax is None:
        soft, lse, lse_head = out, weights.gates, 0  # not read
    else:  # before the kernel, which writes into the ring
        soft, lse = softmax(layer, q, k, v, batch)
        lse_head = lse.stride(0)
    scratch = scratch_buffers(layout, num_rows, q.device)
    per_row = chunks + 1
    if apart:
        kept = kept_buffers(layout, num_rows * per_row, q.device)
    else:  # not used
        kept = Kept(weights.gates, weights.gates, rows)
    mixing = weights.subtract_max, weights.has_sinks
    shared = prefill_constants(
        layout, Hq, mixing, softmax is not None, weights.rotated_map_after, apart
    )
    precise = precision(q.dtype)
    prefill_kernel[(num_rows * layout.num_kv_heads,)](
        q, k, v, out, weights.feature_map_q, weights.gates, weights.key_maps,
        weights.importance, pages, layer.device_table, state_indices, rows, soft, lse, *scratch,
        *kept, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        out.stride(0), out.stride(1), pages.stride(0), state_indices.stride(0), lse_head, num_rows,
        max(layout.sizes), per_row, d**-0.5, **shared, PRECISION=precise, num_warps=NUM_WARPS,
    )  # fmt: skip
    if apart:
        constants = attend_constants(layout, Hq, mixing)
        tiles = triton.cdiv(Hq // layout.num_state_heads, constants["TILE_HEADS"])
        attend_kernel[(num_rows * per_row, layout.num_state_heads * tiles)](
            q, k, v, out, weights.feature_map_q, weights.gates, layer.device_table,
            state_indices, rows, *kept, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            v.stride(0), v.stride(1), out.stride(0), out.stride(1), state_indices.stride(0),
            num_rows, per_row, max(layout.sizes), d**-0.5, **constants, PRECISION=precise,
            num_warps=ATTEND_WARPS,
        )  # fmt: skip


def attend_constants(layout: LayerLayout, Hq: int, mixing: tuple[bool, bool]) -> dict[str, Any]:
    """`attend_kernel`'s compile-time arguments, all but PRECISION.

    Args:
        mixing: `subtract_max` and `has_sinks` of `LolaWeights`.
    """
    BLOCK_M, TILE_HEADS = tile_of(layout, Hq)
    return {
        "SHAPE": layer_shape(layout, Hq),
        "BLOCK_M": BLOCK_M,
        "TILE_HEADS": TILE_HEADS,
        "BLOCK_N": pairs_per_tile(layout),
        "SUBTRACT_MAX": mixing[0],
        "HAS_SINKS": mixing[1],
    }


def prefill_constants(
    layout: LayerLayout,
    Hq: int,
    mixing: tuple[bool, bool],
    partial: bool,
    rotated_map_after: int,
    apart: bool,
) -> dict[str, Any]:
    """`prefill_kernel`'s compile-time arguments, all but PRECISION."""
    return {
        **attend_constants(layout, Hq, mixing),
        "SHAPE": layer_shape(layout, Hq, rotated_map_after),
        "PARTIAL": partial,
        "SCORE_BLOCK": score_block(layout),
        "UPDATE_PRECISION": UPDATE_PRECISION,
        "APART": apart,
        **fold_constants(layout),
    }


@functools.lru_cache(maxsize=64)  # the segments that context shifts cut a step into
def rows_on(device: torch.device, query_start_loc: bytes, context_lens: bytes) -> Tensor:
    """The rows of a batch that have tokens, on a device, made once for all layers of a model's
    step: the longest first, so that the last programs to start are short.

    Args:
        query_start_loc, context_lens: as in `contract.PrefillBatch`, bytes of int64.

    Returns:
        `[4, rows]` int32: first token, tokens before the segment, tokens of it, row of the batch.
    """
    starts = np.frombuffer(query_start_loc, np.int64)
    lengths = np.diff(starts)
    order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths > 0)]
    rows = np.stack([starts[:-1], np.frombuffer(context_lens, np.int64), lengths])
    ordered = np.concatenate([rows[:, order], order[None]])
    return on_device(np.ascontiguousarray(ordered, np.int32), device)


def on_device(array: npt.NDArray[np.integer], device: torch.device) -> Tensor:
    """A copy of an array, made without waiting for the device."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # only pinned memory is copied without waiting
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor
