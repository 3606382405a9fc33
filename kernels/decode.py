"""One fused decode step in Triton (LoLA, arXiv 2505.23666): write the pair, attend, mix.

A program serves the query heads of one state head of one row. It reads the exact pairs by position
(sinks, then the window), the sparse entries and the hidden state once, and holds nothing but
running sums. The new pair comes from k and v and not from the ring, so no program waits for the one
that writes it. When rows x heads are too few to fill the GPU, the pairs are cut into splits, with
one more program for the hidden state, and the launch of folds joins them (`splits.py`).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lola_vllm.core.ops.contract import DecodeBatch, LayerState
from lola_vllm.core.state import LayerLayout
from lola_vllm.kernels.candidates import set_at, set_of
from lola_vllm.kernels.common import (
    absorb,
    absorb_cached,
    features,
    load_gate,
    load_sink,
    mix,
    product,
)
from lola_vllm.kernels.layer import (
    EXACT_K,
    EXACT_V,
    MIN_DOT,
    any_folded,
    exact_of,
    exact_row,
    h_of,
    layer_shape,
    map_of,
    num_entries,
    pairs_per_tile,
    precision,
    s_of,
    window_start,
)
from lola_vllm.kernels.splits import Parts

NUM_WARPS = 4
INDEX_ARGS = ("state_indices_ptr", "n_ptr")  # slices of vLLM's buffers: any alignment


@triton.jit(
    do_not_specialize=("state_indices_stride", "n_stride"),
    do_not_specialize_on_alignment=INDEX_ARGS,
)
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    wq_ptr,
    gate_ptr,
    pages_ptr,
    table_ptr,
    state_indices_ptr,
    n_ptr,
    partial_ptr,
    stats_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    out_head,
    page_stride,
    state_indices_stride,
    n_stride,
    scale,
    SHAPE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    SUBTRACT_MAX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (B * Hs, 1), or with SPLIT (B * Hs, splits + 1), the last part for the hidden state.

    With splits, writes softmax sums and y_lin to partial `[B, Hq, splits + 1, d]` and (m, norm), or
    log D in place of m, to stats `[B, Hq, splits + 1, 2]`, both float32.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    F: tl.constexpr = SHAPE.FEATURE_DIM
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    BLOCK_F: tl.constexpr = SHAPE.BLOCK_F
    Q: tl.constexpr = SHAPE.NUM_HEADS // SHAPE.NUM_STATE_HEADS
    # State heads that share a KV head run side by side, so that L2 serves all but the first.
    row = (tl.program_id(0) // SHAPE.NUM_STATE_HEADS).to(tl.int64)
    head = tl.program_id(0) % SHAPE.NUM_STATE_HEADS
    part = tl.program_id(1)
    splits = tl.num_programs(1) - 1 if SPLIT else 1
    cols, lanes = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Q)
    col_ok, lane_ok = cols < D, lanes < Q
    q_ok = lane_ok[:, None] & col_ok[None, :]
    q_heads = head * Q + lanes
    out_at = out_ptr + row * out_row + q_heads[:, None] * out_head + cols[None, :]

    page = tl.load(state_indices_ptr + row * state_indices_stride).to(tl.int64)
    n = tl.load(n_ptr + row * n_stride).to(tl.int32)
    if (page <= 0) | (n <= 0):
        if not SPLIT:
            zero = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
            tl.store(out_at, zero.to(out_ptr.dtype.element_ty), mask=q_ok)
        return

    group_at, kv_head, own_kv_head, own_set = set_of(table_ptr, head // SHAPE.STATES_PER_SET, SHAPE)
    lam = num_entries(group_at)
    page_at = pages_ptr + page * page_stride
    q_at = q_ptr + row * q_row + head * Q * q_head
    q = tl.load(q_at + lanes[:, None] * q_head + cols[None, :], mask=q_ok, other=0.0)
    k_at, v_at = k_ptr + row * k_row + kv_head * k_head, v_ptr + row * v_row + kv_head * v_head
    k_new = tl.load(k_at + cols, mask=col_ok, other=0.0).to(SHAPE.KV_TYPE)
    v_new = tl.load(v_at + cols, mask=col_ok, other=0.0).to(SHAPE.KV_TYPE)

    position = n - 1
    exact_k_at = exact_of(page_at, group_at, EXACT_K, own_kv_head, SHAPE)
    exact_v_at = exact_of(page_at, group_at, EXACT_V, own_kv_head, SHAPE)
    if (part == 0) & (head % (SHAPE.NUM_STATE_HEADS // SHAPE.NUM_KV_HEADS) == 0):
        to = exact_row(position, SHAPE) * D + cols
        tl.store(exact_k_at + to, k_new, mask=col_ok)
        tl.store(exact_v_at + to, v_new, mask=col_ok)

    # The older pairs in one order: sinks, window, sparse entries. A split is a range of it.
    first = window_start(position, SHAPE)
    num_sinks = tl.minimum(position, SHAPE.SINK_SIZE)
    num_exact = num_sinks + tl.maximum(position - first, 0)
    total = num_exact + tl.minimum(first - SHAPE.SINK_SIZE, lam)
    span = tl.cdiv(tl.cdiv(total, splits), BLOCK_N) * BLOCK_N
    start = tl.minimum(part * span, total)
    stop = tl.minimum(start + span, total)

    new = part == 0
    z_new = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
    m = tl.where(new, z_new, float("-inf"))
    norm = tl.where(new, 1.0, 0.0) + tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.where(new, v_new.to(tl.float32)[None, :], 0.0)
    acc = acc + tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    exact_stop = tl.minimum(stop, num_exact)
    for j in range(start, exact_stop, BLOCK_N):
        index = j + tl.arange(0, BLOCK_N)
        ok = index < exact_stop
        at = tl.where(index < num_sinks, index, first + index - num_sinks)
        at = exact_row(at, SHAPE)[:, None] * D + cols[None, :]
        tile_ok = ok[:, None] & col_ok[None, :]
        k = tl.load(exact_k_at + at, mask=tile_ok, other=0.0)
        v = tl.load(exact_v_at + at, mask=tile_ok, other=0.0)
        m, norm, acc = absorb(q, k, v, ok[None, :], scale, m, norm, acc, PRECISION)

    pairs_at = set_at(page_at, group_at, own_set, own_kv_head, lam, SHAPE)
    for j in range(tl.maximum(start, num_exact) - num_exact, stop - num_exact, BLOCK_N):
        index = j + tl.arange(0, BLOCK_N)
        ok = index < stop - num_exact
        m, norm, acc = absorb_cached(
            q, pairs_at, index, ok, cols, scale, m, norm, acc, SHAPE, PRECISION
        )

    y_lin = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    log_D = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    linear_here = part == (splits if SPLIT else 0)
    if linear_here & any_folded(group_at, first, SHAPE):  # before this token
        feats = tl.arange(0, BLOCK_F)
        feat_ok = feats < F
        w_ok = col_ok[:, None] & feat_ok[None, :]
        y = tl.zeros([BLOCK_Q, BLOCK_F], tl.float32)
        for i in range(Q):  # every query head has its own map, so no product of matrices
            w_at = map_of(wq_ptr, head * Q + i, SHAPE) + cols[:, None] * F + feats[None, :]
            w = tl.load(w_at, mask=w_ok, other=0.0).to(tl.float32)
            x = tl.load(q_at + i * q_head + cols, mask=col_ok, other=0.0).to(tl.float32)
            y = tl.where(lanes[:, None] == i, tl.sum(x[:, None] * w, 0)[None, :], y)
        own = own_set * SHAPE.STATES_PER_SET + head % SHAPE.STATES_PER_SET
        h_at = h_of(page_at, group_at, own, SHAPE)
        h_at = h_at + feats[:, None] * D + cols[None, :]
        s_at = s_of(page_at, group_at, own, SHAPE) + feats
        tile_ok = feat_ok[:, None] & col_ok[None, :]
        phi = features(y, feat_ok)
        h = tl.load(h_at, mask=tile_ok, other=0.0)
        y_lin = product(phi, h, y_lin, PRECISION)
        z = tl.sum(phi * tl.load(s_at, mask=feat_ok, other=0.0)[None, :], 1)
        phi = features(-y, feat_ok)
        h = tl.load(h_at + F * D, mask=tile_ok, other=0.0)
        y_lin = product(phi, h, y_lin, PRECISION)
        z += tl.sum(phi * tl.load(s_at + F, mask=feat_ok, other=0.0)[None, :], 1)
        y_lin, log_D = y_lin / z[:, None], tl.log(z)

    if not SPLIT:
        log_gate = load_gate(gate_ptr, q_heads, lane_ok)
        norm += tl.exp(load_sink(gate_ptr, q_heads, lane_ok) - m)
        y = mix(m, norm, acc / norm[:, None], y_lin, log_D, log_gate, SUBTRACT_MAX)
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=q_ok)
    else:
        at = (row * SHAPE.NUM_HEADS + q_heads) * (splits + 1) + part
        acc = tl.where(part == splits, y_lin, acc)
        m = tl.where(part == splits, log_D, m)
        tl.store(partial_ptr + at[:, None] * D + cols[None, :], acc, mask=q_ok)
        tl.store(stats_ptr + at * 2, m, mask=lane_ok)
        tl.store(stats_ptr + at * 2 + 1, norm, mask=lane_ok)


def attend(
    layer: LayerState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: DecodeBatch,
    out: Tensor,
    splits: int,
) -> Parts:
    """Write the new pairs and answer the queries; no update. Shapes as in `contract.DecodeOp`.

    Args:
        splits: parts that a row's pairs are cut into (`choose_splits`), at most `MAX_SPLITS`.

    Returns:
        What `update` joins, where there are several.
    """
    B, Hq, d = q.shape
    layout, pages, weights = layer.layout, layer.pages, layer.weights
    state_indices, seq_lens = batch
    if splits > 1:
        partial = torch.empty(B, Hq, splits + 1, d, dtype=torch.float32, device=q.device)
        stats = torch.empty(B, Hq, splits + 1, 2, dtype=torch.float32, device=q.device)
    else:  # not used: any float32 pointer does
        partial = stats = weights.gates
    decode_kernel[(B * layout.num_state_heads, splits + 1 if splits > 1 else 1)](
        q, k, v, out, weights.feature_map_q, weights.gates, pages, layer.device_table,
        state_indices, seq_lens, partial, stats,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        out.stride(0), out.stride(1), pages.stride(0), state_indices.stride(0), seq_lens.stride(0),
        d**-0.5, **decode_constants(layout, Hq, splits > 1, weights.subtract_max),
        PRECISION=precision(q.dtype), num_warps=NUM_WARPS,
    )  # fmt: skip
    return Parts(out, weights.gates, partial, stats, splits)


def decode_constants(
    layout: LayerLayout, Hq: int, split: bool, subtract_max: bool
) -> dict[str, object]:
    """`decode_kernel`'s compile-time arguments, all but PRECISION."""
    return {
        "SHAPE": layer_shape(layout, Hq),
        "BLOCK_Q": max(MIN_DOT, triton.next_power_of_2(Hq // layout.num_state_heads)),
        "BLOCK_N": pairs_per_tile(layout),
        "SPLIT": split,
        "SUBTRACT_MAX": subtract_max,
    }
