"""The update rule in Triton (LoLA, arXiv 2505.23666, section 3.3): score, then select and fold.

Two kernels of fixed grid, so a CUDA graph can replay them: every program reads the token counts of
all rows, finds those at an update point, and takes its share of their work, or none. What a step
has due is known on the device only; the grid does not depend on it. Both take all heads of a layer.

- `score_kernel`: self-recall errors of all candidates (cached and evicted pairs) of the due rows.
- `fold_kernel`: picks the lam best of each sparse set, adds the others to H and s, and puts the
  kept incoming pairs into the free entries. One program per row and set, because folding reads the
  entries that replacing overwrites. It also joins the parts of answers where attention was split:
  in a launch that a step has in any case, that costs no other.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lola_vllm.core.ops.contract import LayerState
from lola_vllm.core.state import LayerLayout
from lola_vllm.kernels.candidates import (
    BLOCK_R,
    COUNT_ARGS,
    INDEX_ARGS,
    due_rows,
    nth_row,
    position_of,
    set_of,
)
from lola_vllm.kernels.fold import fold_set, score_tile
from lola_vllm.kernels.layer import (
    MIN_DOT,
    POSITIONS,
    RECENT_SIZE,
    layer_shape,
    num_entries,
    num_processors,
    part_of,
    window_start,
)
from lola_vllm.kernels.selection import BLOCK_A
from lola_vllm.kernels.splits import MAX_SPLITS, Parts, join

BLOCK_E = 32  # candidates scored, folded or replaced at a time, at most
PROGRAMS_PER_PROCESSOR = 1  # the registers of one fill it, and idle ones should be one wave
SCORE_WARPS, FOLD_WARPS = 8, 8  # four warps would spill registers at d = 128
# The order of the scores decides which pairs stay exact, so plain TF32 will not do.
PRECISION = "tf32x3"


@triton.jit(do_not_specialize=COUNT_ARGS, do_not_specialize_on_alignment=INDEX_ARGS)
def score_kernel(
    wk_ptr,
    ws_ptr,
    pages_ptr,
    table_ptr,
    state_indices_ptr,
    n_ptr,
    scores_ptr,
    page_stride,
    state_indices_stride,
    n_stride,
    num_rows,
    most,
    least,
    blocks,
    SHAPE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores `[num_rows, Hg, most + C]`, float32, of the sets whose cache overflows now. Any grid.

    most, least: entries of the largest and of the smallest set. blocks: programs' work that a set
    is cut into.
    """
    C: tl.constexpr = SHAPE.UPDATE_INTERVAL
    for base in range(0, num_rows, BLOCK_R):
        rows = base + tl.arange(0, BLOCK_R)
        due = due_rows(
            state_indices_ptr, n_ptr, state_indices_stride, n_stride, rows, num_rows, least, SHAPE
        )
        rank = tl.cumsum(due.to(tl.int32), 0)
        items = tl.sum(due.to(tl.int32), 0) * (SHAPE.NUM_SPARSE_HEADS * blocks)
        for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
            row = nth_row(due, rank, rows, item // (SHAPE.NUM_SPARSE_HEADS * blocks)).to(tl.int64)
            sparse_head, first = item // blocks % SHAPE.NUM_SPARSE_HEADS, item % blocks * BLOCK_E
            group_at, kv_head, own_kv_head, own_set = set_of(table_ptr, sparse_head, SHAPE)
            lam = num_entries(group_at)
            n = tl.load(n_ptr + row * n_stride).to(tl.int32)
            stop = window_start(n, SHAPE)
            here = (lam > 0) & (first < lam + C) & (stop - SHAPE.SINK_SIZE > lam)
            page = tl.load(state_indices_ptr + row * state_indices_stride).to(tl.int64)
            page_at = pages_ptr + page * page_stride
            scratch = row * SHAPE.NUM_SPARSE_HEADS + sparse_head
            scores_at = scores_ptr + scratch * (most + C)
            recent = tl.load(group_at + RECENT_SIZE).to(tl.int32)
            if here:
                positions_at = part_of(page_at, group_at, POSITIONS, tl.int32) + own_set * lam
                e = first + tl.arange(0, BLOCK_E)
                start = window_start(n - C, SHAPE)
                ok, position = position_of(positions_at, e, start, stop, lam, SHAPE)
                # Recent pairs stay whatever their scores are: a tile of them is left out.
                if tl.sum((ok & (position < stop - recent)).to(tl.int32), 0) > 0:
                    score_tile(
                        wk_ptr, ws_ptr, page_at, group_at, sparse_head, kv_head, own_set,
                        own_kv_head, n, e, ok, scores_at, SHAPE, PRECISION,
                    )  # fmt: skip


@triton.jit(do_not_specialize=COUNT_ARGS, do_not_specialize_on_alignment=INDEX_ARGS)
def fold_kernel(
    wk_ptr,
    ws_ptr,
    pages_ptr,
    table_ptr,
    state_indices_ptr,
    n_ptr,
    scores_ptr,
    lists_ptr,
    out_ptr,
    gate_ptr,
    partial_ptr,
    stats_ptr,
    page_stride,
    state_indices_stride,
    n_stride,
    num_rows,
    most,
    out_row,
    out_head,
    splits,
    SHAPE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_A: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SUBTRACT_MAX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Select, fold and replace in the rows that are due, and join the parts of answers. Any grid.

    most: entries of the largest set. out and those after it: of `splits.Parts`.
    """
    C: tl.constexpr = SHAPE.UPDATE_INTERVAL
    # From the last program on, as folds are the first programs' work.
    joins = tl.where(splits > 1, num_rows * SHAPE.NUM_HEADS, 0)
    last = tl.num_programs(0) - 1 - tl.program_id(0)
    for item in tl.range(
        last, joins, tl.num_programs(0), num_stages=1, disable_licm=True
    ):  # fmt: skip
        join(
            item, out_ptr, gate_ptr, state_indices_ptr, n_ptr, partial_ptr, stats_ptr, out_row,
            out_head, state_indices_stride, n_stride, splits, SHAPE, MAX_SPLITS, SUBTRACT_MAX,
        )  # fmt: skip
    for base in range(0, num_rows, BLOCK_R):
        rows = base + tl.arange(0, BLOCK_R)
        due = due_rows(
            state_indices_ptr, n_ptr, state_indices_stride, n_stride, rows, num_rows, 0, SHAPE
        )
        rank = tl.cumsum(due.to(tl.int32), 0)
        items = tl.sum(due.to(tl.int32), 0) * SHAPE.NUM_SPARSE_HEADS
        # What is hoisted would keep registers from folds, which spill then.
        for item in tl.range(
            tl.program_id(0), items, tl.num_programs(0), num_stages=1, disable_licm=True
        ):  # fmt: skip
            row = nth_row(due, rank, rows, item // SHAPE.NUM_SPARSE_HEADS).to(tl.int64)
            sparse_head = item % SHAPE.NUM_SPARSE_HEADS
            group_at, kv_head, own_kv_head, own_set = set_of(table_ptr, sparse_head, SHAPE)
            page = tl.load(state_indices_ptr + row * state_indices_stride).to(tl.int64)
            n = tl.load(n_ptr + row * n_stride).to(tl.int32)
            scratch = row * SHAPE.NUM_SPARSE_HEADS + sparse_head
            fold_set(
                wk_ptr, ws_ptr, pages_ptr + page * page_stride, group_at, sparse_head, kv_head,
                own_set, own_kv_head, n, scores_ptr + scratch * (most + C),
                lists_ptr + scratch * 3 * C, SHAPE, BLOCK_E, BLOCK_A, PRECISION,
            )  # fmt: skip


class Scratch(NamedTuple):
    """What kernels of an update leave for the next one, for `num_rows` rows.

    scores `[num_rows, Hg, most + C]`, float32, with `most` entries in the largest set. lists
    `[num_rows, Hg, 3, C]`, int32. Where some pairs are recent, listed `[num_rows, Hg, most + C]`,
    int32: the candidates that prefill scores. Else it is empty.
    """

    scores: Tensor
    lists: Tensor
    listed: Tensor


def update(
    layer: LayerState, state_indices: Tensor, seq_lens: Tensor, scratch: Scratch, parts: Parts
) -> None:
    """Evict, rescore, select, fold and replace in the rows that are at an update point, and join
    the parts of answers.

    Args:
        state_indices, seq_lens: `[B]`, any integer dtypes: each row's page and tokens.
        scratch: from `scratch_buffers`. parts: from `decode.attend`.
    """
    layout, weights = layer.layout, layer.weights
    num_rows, sizes = len(state_indices), layout.sizes
    own = layer_shape(layout, weights.num_heads, weights.rotated_map_after)
    shape = {"SHAPE": own, "BLOCK_R": BLOCK_R, "PRECISION": PRECISION}
    most = PROGRAMS_PER_PROCESSOR * num_processors(layer.pages.device)
    common = (
        weights.key_maps, weights.importance, layer.pages, layer.device_table, state_indices,
        seq_lens, scratch.scores,
    )  # fmt: skip
    strides = layer.pages.stride(0), state_indices.stride(0), seq_lens.stride(0), num_rows
    if has_scores(layout):
        blocks = triton.cdiv(max(sizes) + own.UPDATE_INTERVAL, score_block(layout))
        score_kernel[(min(most, num_rows * len(sizes) * blocks),)](
            *common, *strides, max(sizes), min(sizes), blocks, **shape,
            BLOCK_E=score_block(layout), num_warps=SCORE_WARPS,
        )  # fmt: skip
    joins = num_rows * own.NUM_HEADS if parts.splits > 1 else 0
    fold_kernel[(min(most, num_rows * len(sizes) + joins),)](
        *common, scratch.lists, *parts[:-1], *strides, max(sizes),
        parts.out.stride(0), parts.out.stride(1), parts.splits, **shape, **fold_constants(layout),
        **join_constants(weights.subtract_max), num_warps=FOLD_WARPS,
    )  # fmt: skip


def has_scores(layout: LayerLayout) -> bool:
    """Whether scores are computed: sets without entries fold all that leaves."""
    return any(page.sparse_cache_size for page in layout.pages)


def score_block(layout: LayerLayout) -> int:
    """Candidates scored at a time: 32 spill registers at d = 128."""
    return MIN_DOT if layout.pages[0].head_dim > 64 else BLOCK_E


def join_constants(subtract_max: bool) -> dict[str, int]:
    """What `fold_kernel` takes at compile time for `join`."""
    return {"MAX_SPLITS": MAX_SPLITS, "SUBTRACT_MAX": subtract_max}


def fold_constants(layout: LayerLayout) -> dict[str, int]:
    """What `fold_set` takes at compile time, beside SHAPE and PRECISION."""
    page = layout.pages[0]
    interval = page.update_interval  # pairs folded at an update
    most = MIN_DOT if page.int8_pairs else score_block(layout)  # int8 keys are widened to float32
    return {
        "BLOCK_E": min(most, max(MIN_DOT, triton.next_power_of_2(interval))),
        "BLOCK_A": BLOCK_A,
    }


def scratch_buffers(layout: LayerLayout, num_rows: int, device: torch.device) -> Scratch:
    """Scratch of updates of up to `num_rows` rows."""
    page, sizes = layout.pages[0], layout.sizes
    Hg, most, C = len(sizes), max(sizes), page.update_interval
    listed = num_rows if any(page.recent_size for page in layout.pages) else 0
    return Scratch(
        torch.empty(num_rows, Hg, most + C, dtype=torch.float32, device=device),
        torch.empty(num_rows, Hg, 3, C, dtype=torch.int32, device=device),
        torch.empty(listed, Hg, most + C, dtype=torch.int32, device=device),
    )
