"""The parts that a decoded row's pairs are cut into: how many, and how their results are joined.

`decode.decode_kernel` leaves sums of each part. The last launch of a step, `update.fold_kernel`,
joins them beside its folds, which need none of them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lola_vllm.core.state import LayerLayout
from lola_vllm.kernels.common import load_gate, load_sink, mix
from lola_vllm.kernels.layer import num_processors, pairs_per_tile

PROGRAMS_PER_PROCESSOR = 2  # splits are added until there are about this many
MAX_SPLITS = 32


class Parts(NamedTuple):
    """What a decode step leaves for `join`.

    Attributes:
        out: `[B, Hq, d]`, the answers. gates: of `LolaWeights`.
        partial: `[B, Hq, splits + 1, d]`: softmax sums of each part, and y_lin. stats:
            `[B, Hq, splits + 1, 2]`: (m, norm) of each, and log D in place of m. Both float32; not
            read of one part.
        splits: how many parts there are; of one, out holds the answers already.
    """

    out: Tensor
    gates: Tensor
    partial: Tensor
    stats: Tensor
    splits: int


@triton.jit
def join(
    item, out_ptr, gate_ptr, state_indices_ptr, n_ptr, partial_ptr, stats_ptr, out_row, out_head,
    state_indices_stride, n_stride, splits, SHAPE: tl.constexpr, MAX_SPLITS: tl.constexpr,
    SUBTRACT_MAX: tl.constexpr,
):  # fmt: skip
    """Join the parts of a query head of a row, item = row * Hq + head, mix, and write the answer.

    Pointers and strides: of `Parts`, and of the batch.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    row, head = tl.full([], item // SHAPE.NUM_HEADS, tl.int64), item % SHAPE.NUM_HEADS
    parts, cols = tl.arange(0, MAX_SPLITS), tl.arange(0, SHAPE.BLOCK_D)
    col_ok = cols < D
    out_at = out_ptr + row * out_row + head * out_head + cols
    page = tl.load(state_indices_ptr + row * state_indices_stride)
    if (page <= 0) | (tl.load(n_ptr + row * n_stride) <= 0):
        zero = tl.zeros([SHAPE.BLOCK_D], tl.float32)
        tl.store(out_at, zero.to(out_ptr.dtype.element_ty), mask=col_ok)
    else:
        part_ok = parts < splits
        base = (row * SHAPE.NUM_HEADS + head) * (splits + 1)
        m = tl.load(stats_ptr + (base + parts) * 2, mask=part_ok, other=float("-inf"))
        norm = tl.load(stats_ptr + (base + parts) * 2 + 1, mask=part_ok, other=0.0)
        top = tl.max(m, 0)  # finite: the new token is in part 0
        weight = tl.exp(m - top)
        head_ok = head < SHAPE.NUM_HEADS
        log_gate = load_gate(gate_ptr, head, head_ok)
        sink = load_sink(gate_ptr, head, head_ok)
        total = tl.sum(norm * weight, 0) + tl.exp(sink - top)
        sums = tl.load(
            partial_ptr + (base + parts)[:, None] * D + cols[None, :],
            mask=part_ok[:, None] & col_ok[None, :],
            other=0.0,
        )
        y_soft = tl.sum(sums * weight[:, None], 0) / total
        y_lin = tl.load(partial_ptr + (base + splits) * D + cols, mask=col_ok, other=0.0)
        one = tl.zeros([1], tl.int32)
        log_D = tl.load(stats_ptr + (base + splits) * 2 + one)
        y = mix(
            top, total + one.to(tl.float32), y_soft[None, :], y_lin[None, :], log_D, log_gate,
            SUBTRACT_MAX,
        )  # fmt: skip
        tl.store(out_at[None, :], y.to(out_ptr.dtype.element_ty), mask=col_ok[None, :])


def choose_splits(layout: LayerLayout, num_rows: int, device: torch.device) -> int:
    """Parts that a row's pairs are cut into: a power of two from shapes alone, 1 when B is large.

    Bounded by the tiles that the largest of a full layer's heads has.
    """
    page = layout.pages[0]
    programs = max(1, num_rows * layout.num_state_heads)
    wanted = PROGRAMS_PER_PROCESSOR * num_processors(device) // programs
    pairs = page.sink_size + page.ring_size + max(layout.sizes)
    limit = min(MAX_SPLITS, wanted, triton.cdiv(pairs, pairs_per_tile(layout)))
    return 1 << max(0, limit.bit_length() - 1)
