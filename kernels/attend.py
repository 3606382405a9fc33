"""Attention of a prompt's chunks: within the loop over them, or in a launch of its own.

Within a chunk the window's start, the sparse cache and the hidden state stand still, so its queries
differ only in how much of the chunk itself they see.

Few rows do not fill a GPU with a program for each row and KV head. Then the loop of `prefill.py`
chooses and folds alone, and keeps of each chunk what stood in the page when it began: the positions
of the sparse entries, H and s. `attend_kernel` comes after it, a program for each chunk and tile of
heads. Only sequences from their first token on are attended so, as the keys and values of all
positions are in the call then.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lola_vllm.core.state import LayerLayout, StateLayout
from lola_vllm.kernels.candidates import set_at
from lola_vllm.kernels.common import (
    absorb,
    absorb_cached,
    absorb_int8,
    int8_numbers,
    int8_scale,
    load_gate,
    load_sink,
    mix,
    read_state,
)
from lola_vllm.kernels.layer import (
    MIN_DOT,
    any_folded,
    exact_row,
    group_of,
    h_of,
    map_of,
    num_entries,
    num_processors,
    s_of,
    window_start,
)

MAX_BLOCK_M = 64  # queries attended at a time
NUM_WARPS = 8  # four would spill registers at d = 128
MAX_KEPT_BYTES = 2**28  # of a layer; a prompt that needs more is attended within the loop


class Kept(NamedTuple):
    """What a page held when each chunk began, one chunk more than there are for each row.

    H `[chunks, Hs, 2F, d]`, s `[chunks, Hs, 2F]`, float32; positions `[chunks, Hg, most]`, int32,
    with `most` entries in the largest set.
    """

    H: Tensor
    s: Tensor
    positions: Tensor


@triton.jit
def pairs_of_call(k_at, v_at, tokens, ok, cols, k_token, v_token, SHAPE: tl.constexpr):
    """Keys and values `[len(tokens), BLOCK_D]` of tokens of the call, zero where not ok, as the
    page would hold them. k_at, v_at: of token 0."""
    tile_ok, tokens = ok[:, None] & (cols < SHAPE.HEAD_DIM)[None, :], tokens[:, None]
    k = tl.load(k_at + tokens * k_token + cols[None, :], mask=tile_ok, other=0.0)
    v = tl.load(v_at + tokens * v_token + cols[None, :], mask=tile_ok, other=0.0)
    return k.to(SHAPE.KV_TYPE), v.to(SHAPE.KV_TYPE)


@triton.jit
def attend_block(
    q_at, out_at, soft_at, lse_at, k_at, v_at, wq_ptr, gate_ptr, page_at, group_at, head, num_heads,
    own_kv_head, position, length, m0, q_token, q_head, k_token, v_token, out_token, out_head,
    lse_head, scale,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, TILE_HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
    SUBTRACT_MAX: tl.constexpr, HAS_SINKS: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr, kept_at=None,
):  # fmt: skip
    """Answer queries of heads that share a state head, from the m0-th token of a chunk on.

    The tile's BLOCK_M rows are those of num_heads heads, at most TILE_HEADS, head by head: so their
    pairs and H are read once. Pointers q_at to v_at are the first head's and its KV head's, of the
    chunk's first token, which has the position; length: tokens of the chunk. head: the first of
    them in the layer, own_kv_head: in the group.

    kept_at: None, or where the call holds the sequence from its first token on, and what
    `prefill_apart.py` kept of the chunk: positions of the set's entries, H and s of the state head.
    Then the page is not read.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    TOKENS: tl.constexpr = BLOCK_M // TILE_HEADS
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    lane, queries = rows // TOKENS, m0 + rows % TOKENS
    query_ok, col_ok = (queries < length) & (lane < num_heads), cols < D
    q_ok = query_ok[:, None] & col_ok[None, :]
    from_q = q_at + (lane * q_head + queries * q_token)[:, None] + cols[None, :]
    q = tl.load(from_q, mask=q_ok, other=0.0)
    if TILE_HEADS > 1:
        tokens = m0 + tl.arange(0, TOKENS)
        of_first = q_at + tokens[:, None] * q_token + cols[None, :]
        by_head = (of_first, (tokens < length)[:, None] & col_ok[None, :], q_head, num_heads)
    else:
        by_head: tl.constexpr = None  # type: ignore[no-redef]
    lam = num_entries(group_at)
    heads_of_kv = SHAPE.NUM_HEADS // SHAPE.NUM_KV_HEADS
    own_set = head % heads_of_kv // (SHAPE.NUM_HEADS // SHAPE.NUM_SPARSE_HEADS)
    own_set += own_kv_head * SHAPE.SETS_PER_KV_HEAD
    if kept_at is None:
        pairs_at = set_at(page_at, group_at, own_set, own_kv_head, lam, SHAPE)

    first = window_start(position, SHAPE)
    if PARTIAL:
        m = tl.load(lse_at + lane * lse_head + queries, mask=query_ok, other=0.0)
        norm = tl.full([BLOCK_M], 1.0, tl.float32)
        at = (queries * SHAPE.NUM_HEADS + lane)[:, None] * D + cols[None, :]
        acc = tl.load(soft_at + at, mask=q_ok, other=0.0).to(tl.float32)
    else:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

        # The chunk itself, causal. Its first tile holds its first pair, which every query sees.
        for j in range(0, tl.minimum(length, m0 + TOKENS), BLOCK_N):
            index = j + tl.arange(0, BLOCK_N)
            ok = (index[None, :] <= queries[:, None]) & (index < length)[None, :]
            k, v = pairs_of_call(k_at, v_at, index, index < length, cols, k_token, v_token, SHAPE)
            m, norm, acc = absorb(q, k, v, ok, scale, m, norm, acc, PRECISION)

        # Sinks and window from before the chunk: every query sees them all.
        num_sinks = tl.minimum(position, SHAPE.SINK_SIZE)
        num_exact = num_sinks + tl.maximum(position - first, 0)
        for j in range(0, num_exact, BLOCK_N):
            index = j + tl.arange(0, BLOCK_N)
            ok = index < num_exact
            at = tl.where(index < num_sinks, index, first + index - num_sinks)
            if kept_at is None:
                at = exact_row(at, SHAPE)[:, None] * D + cols[None, :]
                tile_ok = ok[:, None] & col_ok[None, :]
                k = tl.load(pairs_at[4] + at, mask=tile_ok, other=0.0)
                v = tl.load(pairs_at[5] + at, mask=tile_ok, other=0.0)
            else:
                k, v = pairs_of_call(
                    k_at, v_at, at - position, ok, cols, k_token, v_token, SHAPE
                )  # fmt: skip
            m, norm, acc = absorb(q, k, v, ok[None, :], scale, m, norm, acc, PRECISION)

    num_sparse = tl.minimum(first - SHAPE.SINK_SIZE, lam)
    for j in range(0, num_sparse, BLOCK_N):
        index = j + tl.arange(0, BLOCK_N)
        ok = index < num_sparse
        if kept_at is None:
            m, norm, acc = absorb_cached(
                q, pairs_at, index, ok, cols, scale, m, norm, acc, SHAPE, PRECISION
            )
        else:
            at = tl.load(kept_at[0] + index, mask=ok, other=0) - position
            k, v = pairs_of_call(k_at, v_at, at, ok, cols, k_token, v_token, SHAPE)
            if SHAPE.INT8_PAIRS:
                k, v = k.to(tl.float32), v.to(tl.float32)
                k_scale, v_scale = int8_scale(k), int8_scale(v)
                m, norm, acc = absorb_int8(
                    q, int8_numbers(k, k_scale), int8_numbers(v, v_scale), k_scale, v_scale, ok,
                    scale, m, norm, acc, SHAPE, PRECISION,
                )  # fmt: skip
            else:
                m, norm, acc = absorb(q, k, v, ok[None, :], scale, m, norm, acc, PRECISION)

    if HAS_SINKS:  # read only where there are any: the loop has no register left
        norm += tl.exp(load_sink(gate_ptr, head + lane, lane < num_heads) - m)
    y = acc / norm[:, None]
    if any_folded(group_at, first, SHAPE):  # before this chunk
        if kept_at is None:
            own = head % heads_of_kv // (SHAPE.NUM_HEADS // SHAPE.NUM_STATE_HEADS)
            own += own_kv_head * (SHAPE.NUM_STATE_HEADS // SHAPE.NUM_KV_HEADS)
            h_at, s_at = h_of(page_at, group_at, own, SHAPE), s_of(page_at, group_at, own, SHAPE)
        else:
            h_at, s_at = kept_at[1], kept_at[2]
        y_lin, z = read_state(
            q, map_of(wq_ptr, head, SHAPE), h_at, s_at, cols, SHAPE.FEATURE_DIM, SHAPE, PRECISION,
            by_head,
        )  # fmt: skip
        log_gate = load_gate(gate_ptr, head + lane, lane < num_heads)
        y = mix(m, norm, y, y_lin / z[:, None], tl.log(z), log_gate, SUBTRACT_MAX)
    to = out_at + (lane * out_head + queries * out_token)[:, None] + cols[None, :]
    tl.store(to, y.to(out_at.dtype.element_ty), mask=q_ok)


@triton.jit(
    do_not_specialize=("num_rows", "per_row", "most", "state_indices_stride"),
    do_not_specialize_on_alignment=("state_indices_ptr",),
)
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    wq_ptr,
    gate_ptr,
    table_ptr,
    state_indices_ptr,
    rows_ptr,
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
    state_indices_stride,
    num_rows,
    per_row,
    most,
    scale,
    SHAPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUBTRACT_MAX: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (num_rows * per_row, Hs * tiles of a state head's query heads): chunks, and heads.

    rows: of `prefill.rows_on`, none with tokens before. per_row: chunks that `Kept` has for each.
    """
    C: tl.constexpr = SHAPE.UPDATE_INTERVAL
    H_SIZE: tl.constexpr = 2 * SHAPE.FEATURE_DIM * SHAPE.HEAD_DIM
    HEADS_OF_STATE: tl.constexpr = SHAPE.NUM_HEADS // SHAPE.NUM_STATE_HEADS
    TILES: tl.constexpr = (HEADS_OF_STATE + TILE_HEADS - 1) // TILE_HEADS
    # The first update point that evicts a pair.
    FIRST_DUE: tl.constexpr = (SHAPE.WINDOW_SIZE + SHAPE.SINK_SIZE + C) // C * C
    row, nth_chunk = tl.program_id(0) // per_row, tl.program_id(0) % per_row
    state_head, of_state = tl.program_id(1) // TILES, tl.program_id(1) % TILES * TILE_HEADS
    nth = tl.load(rows_ptr + 3 * num_rows + row).to(tl.int64)
    page = tl.load(state_indices_ptr + nth * state_indices_stride)
    position = tl.where(nth_chunk == 0, 0, FIRST_DUE + (nth_chunk - 1) * C)
    end = tl.load(rows_ptr + 2 * num_rows + row)
    length = tl.minimum(FIRST_DUE + nth_chunk * C, end) - position
    if (page <= 0) | (length <= 0):
        return  # the loop writes the answers of padding

    token = tl.load(rows_ptr + row).to(tl.int64) + position
    head = state_head * HEADS_OF_STATE + of_state
    kv_head = state_head // (SHAPE.NUM_STATE_HEADS // SHAPE.NUM_KV_HEADS)
    group_at, own_kv_head = group_of(table_ptr, kv_head)
    chunk = tl.program_id(0).to(tl.int64)
    state, of_set = chunk * SHAPE.NUM_STATE_HEADS + state_head, state_head // SHAPE.STATES_PER_SET
    kept_at = (
        kept_positions_ptr + (chunk * SHAPE.NUM_SPARSE_HEADS + of_set) * most,
        kept_h_ptr + state * H_SIZE,
        kept_s_ptr + state * 2 * SHAPE.FEATURE_DIM,
    )
    for m0 in tl.range(0, length, BLOCK_M // TILE_HEADS, num_stages=1, disable_licm=True):
        attend_block(
            q_ptr + head * q_head + token * q_token, out_ptr + head * out_head + token * out_token,
            out_ptr, gate_ptr, k_ptr + kv_head * k_head + token * k_token,
            v_ptr + kv_head * v_head + token * v_token, wq_ptr, gate_ptr, out_ptr, group_at, head,
            tl.minimum(HEADS_OF_STATE - of_state, TILE_HEADS), own_kv_head, position, length, m0,
            q_token, q_head, k_token, v_token, out_token, out_head, 0, scale, SHAPE, BLOCK_M,
            TILE_HEADS, BLOCK_N, SUBTRACT_MAX, HAS_SINKS, False, PRECISION, kept_at,
        )  # fmt: skip


def attends_apart(layout: LayerLayout, num_rows: int, chunks: int, device: torch.device) -> bool:
    """Whether prompts from their first tokens on are attended in a launch of their own: those of
    rows that are too few to fill the GPU, where what must be kept is little enough.

    Args:
        chunks: of the longest row.
    """
    if chunks < 2 or num_rows * layout.num_kv_heads >= num_processors(device):
        return False
    d, F = layout.pages[0].head_dim, layout.feature_dim
    state = layout.num_state_heads * 2 * F * (d + 1)
    kept = 4 * (state + len(layout.sizes) * max(layout.sizes))
    return num_rows * (chunks + 1) * kept <= MAX_KEPT_BYTES


def num_chunks(page: StateLayout, tokens: int) -> int:
    """Chunks of a prompt from an empty state, as `chunks.plan_chunks` cuts it."""
    first = page.window_size + page.sink_size + page.update_interval
    first -= first % page.update_interval
    return 1 + max(0, -(-(tokens - first) // page.update_interval))


def kept_buffers(layout: LayerLayout, chunks: int, device: torch.device) -> Kept:
    """Room for so many chunks in all."""
    Hs, sizes = layout.num_state_heads, layout.sizes
    d, F = layout.pages[0].head_dim, layout.feature_dim
    return Kept(
        torch.empty(chunks, Hs, 2 * F, d, dtype=torch.float32, device=device),
        torch.empty(chunks, Hs, 2 * F, dtype=torch.float32, device=device),
        torch.empty(chunks, len(sizes), max(sizes), dtype=torch.int32, device=device),
    )


def tile_of(layout: LayerLayout, Hq: int) -> tuple[int, int]:
    """Queries attended at a time, BLOCK_M, and of how many heads they are, TILE_HEADS.

    First as many tokens as a chunk has that spans an update interval, within limits, then heads
    that share a state head.
    """
    page = layout.pages[0]
    most = MAX_BLOCK_M // 2 if page.head_dim > 64 else MAX_BLOCK_M  # 64 spill registers at d = 128
    tokens = min(most, max(MIN_DOT, triton.next_power_of_2(page.update_interval)))
    heads = min(most // tokens, triton.next_power_of_2(Hq // layout.num_state_heads))
    return tokens * heads, heads
