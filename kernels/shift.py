"""The context shift of pages in Triton: all layers of a model, their rows and heads in one launch.

What it does to a page is `core/ops/context_shift.py`'s, which is the same in plain torch.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lola_vllm.core.ops.contract import LayerState
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import PARTS, TABLE_FIELDS, LayerLayout
from lola_vllm.kernels.candidates import INDEX_ARGS
from lola_vllm.kernels.common import SCALE_STEP, int8_numbers
from lola_vllm.kernels.layer import (
    EXACT_K,
    NUM_FIELDS,
    POSITIONS,
    SCORE_WEIGHTS,
    SPARSE_K,
    SPARSE_K_SCALE,
    any_folded,
    entries_of,
    exact_of,
    h_of,
    layer_shape,
    num_entries,
    pairs_of,
    part_of,
    s_of,
    window_start,
)

BLOCK_N = 32  # keys rotated, or rows of H scaled, at a time
NUM_PARTS = 8  # programs that share a head of a page
NUM_WARPS = 4


class ShiftShape(NamedTuple):
    """A schedule as the kernel takes it: `SCHEDULE`, one constexpr.

    Attributes:
        LENGTH, INTERVAL, BUCKET_START: as in `ShiftSchedule`.
        DECAY_SHIFTS: `score_decay_shifts`; 0: scores do not decay; -1: at all context shifts.
        HALF: pairs of dimensions that RoPE rotates.
        BLOCK_HALF, BLOCK_REST: powers of two, at least `HALF` and the other dimensions.
    """

    LENGTH: int
    INTERVAL: int
    BUCKET_START: int
    DECAY_SHIFTS: int
    HALF: int
    BLOCK_HALF: int
    BLOCK_REST: int


@triton.jit
def rotation_steps(position, n, SCHEDULE: tl.constexpr):
    """`ShiftSchedule.rotation_steps`."""
    shifted = n - SCHEDULE.LENGTH  # before this context shift
    past = position - shifted >= SCHEDULE.BUCKET_START + SCHEDULE.INTERVAL
    return past.to(tl.int32) - (position + shifted < SCHEDULE.BUCKET_START).to(tl.int32)


@triton.jit
def num_shifts(position, SCHEDULE: tl.constexpr):
    """`ShiftSchedule.num_shifts`."""
    after = tl.maximum(position - SCHEDULE.LENGTH, 0) // SCHEDULE.INTERVAL + 1
    return tl.where(position < SCHEDULE.LENGTH, 0, after)


@triton.jit
def rotated(one, two, cos_ptr, sin_ptr, pair, steps, SCHEDULE: tl.constexpr):
    """Both halves `[N, BLOCK_HALF]` of the rotated dimensions of keys, float32: `rotate_by` of
    `KeyRotation`."""
    ok = pair < SCHEDULE.HALF
    cos = tl.load(cos_ptr + pair, mask=ok, other=0.0)[None, :]
    sin = tl.load(sin_ptr + pair, mask=ok, other=0.0)[None, :] * steps[:, None].to(tl.float32)
    return one * cos + two * sin, two * cos - one * sin


@triton.jit
def rotate(keys_at, steps, cos_ptr, sin_ptr, SHAPE: tl.constexpr, SCHEDULE: tl.constexpr):
    """Rotate the keys at `keys_at [N]`, of the model's dtype, in place; where steps are 0 nothing
    is read."""
    pair = tl.arange(0, SCHEDULE.BLOCK_HALF)
    ok = (steps != 0)[:, None] & (pair < SCHEDULE.HALF)[None, :]
    at = keys_at[:, None] + pair[None, :]
    one = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    two = tl.load(at + SCHEDULE.HALF, mask=ok, other=0.0).to(tl.float32)
    one, two = rotated(one, two, cos_ptr, sin_ptr, pair, steps, SCHEDULE)
    tl.store(at, one.to(SHAPE.KV_TYPE), mask=ok)
    tl.store(at + SCHEDULE.HALF, two.to(SHAPE.KV_TYPE), mask=ok)


@triton.jit
def rotate_int8(
    keys_at, scales_at, steps, cos_ptr, sin_ptr, SHAPE: tl.constexpr, SCHEDULE: tl.constexpr
):
    """The same of int8 keys with their scales at `scales_at [N]`: each is rounded again."""
    D: tl.constexpr = SHAPE.HEAD_DIM
    HALF: tl.constexpr = SCHEDULE.HALF
    moves = steps != 0
    pair, other = tl.arange(0, SCHEDULE.BLOCK_HALF), tl.arange(0, SCHEDULE.BLOCK_REST)
    ok = moves[:, None] & (pair < HALF)[None, :]
    rest_ok = moves[:, None] & (other < D - 2 * HALF)[None, :]
    at, rest_at = keys_at[:, None] + pair[None, :], keys_at[:, None] + 2 * HALF + other[None, :]
    scale = tl.load(scales_at, mask=moves, other=0.0)[:, None]
    one = tl.load(at, mask=ok, other=0).to(tl.float32) * scale
    two = tl.load(at + HALF, mask=ok, other=0).to(tl.float32) * scale
    rest = tl.load(rest_at, mask=rest_ok, other=0).to(tl.float32) * scale
    one, two = rotated(one, two, cos_ptr, sin_ptr, pair, steps, SCHEDULE)
    # `int8_scale`: the sums are 0, or NaN where an entry is not finite.
    largest = tl.maximum(tl.max(tl.abs(one), 1), tl.max(tl.abs(two), 1))
    largest = tl.maximum(largest, tl.max(tl.abs(rest), 1))
    scale = largest * SCALE_STEP + tl.sum((one - one) + (two - two), 1) + tl.sum(rest - rest, 1)
    tl.store(at, int8_numbers(one, scale).to(tl.int8), mask=ok)
    tl.store(at + HALF, int8_numbers(two, scale).to(tl.int8), mask=ok)
    tl.store(rest_at, int8_numbers(rest, scale).to(tl.int8), mask=rest_ok)
    tl.store(scales_at, scale, mask=moves)


@triton.jit(
    do_not_specialize=("state_indices_stride", "n_stride"),
    do_not_specialize_on_alignment=INDEX_ARGS,
)
def shift_kernel(
    pages_ptr,
    table_ptr,
    state_indices_ptr,
    n_ptr,
    cos_ptr,
    sin_ptr,
    page_stride,
    state_indices_stride,
    n_stride,
    decay,
    score_decay,
    SHAPE: tl.constexpr,
    SCHEDULE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Shift a share of a KV head of a page. Grid (layers * Hkv, rows, any).

    table `[layers * Hkv, NUM_FIELDS + 1]`: of `head_table`. No program reads what another writes.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    RING: tl.constexpr = SHAPE.RING_SIZE
    STATES: tl.constexpr = SHAPE.STATES_PER_SET * SHAPE.SETS_PER_KV_HEAD
    row = tl.program_id(1).to(tl.int64)
    begin, step = tl.program_id(2) * BLOCK_N, tl.num_programs(2) * BLOCK_N
    page = tl.load(state_indices_ptr + row * state_indices_stride).to(tl.int64)
    if page <= 0:
        return
    n = tl.load(n_ptr + row * n_stride).to(tl.int32)
    page_at = pages_ptr + page * page_stride
    group_at = table_ptr + tl.program_id(0) * (NUM_FIELDS + 1)
    kv_head = tl.load(group_at + NUM_FIELDS).to(tl.int32)  # in its group
    lam = num_entries(group_at)
    lanes, cols = tl.arange(0, BLOCK_N), tl.arange(0, SHAPE.BLOCK_D)

    exact_at = exact_of(page_at, group_at, EXACT_K, kv_head, SHAPE) + SHAPE.SINK_SIZE * D
    for first in tl.range(begin, RING, step, num_stages=1):
        index = first + lanes
        # The last position that the ring's row held, floor division: `n` may be less than RING.
        position = n - 1 - ((n - 1 - index) % RING + RING) % RING
        steps = tl.where(index < RING, rotation_steps(position, n, SCHEDULE), 0)
        rotate(exact_at + index * D, steps, cos_ptr, sin_ptr, SHAPE, SCHEDULE)

    num_sparse = tl.minimum(window_start(n, SHAPE) - SHAPE.SINK_SIZE, lam)
    for i in range(SHAPE.SETS_PER_KV_HEAD):
        own_set = kv_head * SHAPE.SETS_PER_KV_HEAD + i
        keys_at = pairs_of(page_at, group_at, SPARSE_K, own_set, lam, SHAPE)
        scales_at = entries_of(page_at, group_at, SPARSE_K_SCALE, own_set, lam)
        positions_at = part_of(page_at, group_at, POSITIONS, tl.int32) + own_set * lam
        for first in tl.range(begin, lam, step, num_stages=1):
            e = first + lanes
            position = tl.load(positions_at + e, mask=e < lam, other=0)
            steps = tl.where(e < num_sparse, rotation_steps(position, n, SCHEDULE), 0)
            if SHAPE.INT8_PAIRS:
                rotate_int8(
                    keys_at + e * D, scales_at + e, steps, cos_ptr, sin_ptr, SHAPE, SCHEDULE
                )
            else:
                rotate(keys_at + e * D, steps, cos_ptr, sin_ptr, SHAPE, SCHEDULE)
            if SCHEDULE.DECAY_SHIFTS != 0:
                factor = tl.full([BLOCK_N], 1.0, tl.float32) * score_decay
                if SCHEDULE.DECAY_SHIFTS > 0:
                    met = num_shifts(n, SCHEDULE) - num_shifts(position, SCHEDULE)
                    factor = tl.where(met > SCHEDULE.DECAY_SHIFTS, 1.0, factor)
                at = entries_of(page_at, group_at, SCORE_WEIGHTS, own_set, lam) + e
                w = tl.load(at, mask=e < lam, other=0.0)
                tl.store(at, w * factor, mask=e < lam)

    folded = any_folded(group_at, window_start(n, SHAPE), SHAPE)
    rows = tl.where(folded, 2 * SHAPE.FEATURE_DIM, 0)  # of H
    for i in range(STATES):
        head = kv_head * STATES + i
        h_at, s_at = h_of(page_at, group_at, head, SHAPE), s_of(page_at, group_at, head, SHAPE)
        for first in tl.range(begin, rows, step, num_stages=1):
            f = first + lanes
            ok = (f < rows)[:, None] & (cols < D)[None, :]
            at = h_at + f[:, None] * D + cols[None, :]
            tl.store(at, tl.load(at, mask=ok, other=0.0) * decay, mask=ok)
            tl.store(s_at + f, tl.load(s_at + f, mask=f < rows, other=0.0) * decay, mask=f < rows)


def shift_layers(layers: Sequence[LayerState], state_indices: Tensor, num_tokens: Tensor) -> None:
    """Shift the context of pages in all layers of a model; see `context_shift.shift_layers`.

    Args:
        layers: of one model: they have in common all but the sizes of sparse sets. One launch
            serves those whose pages are in one pool.
        state_indices: `[R]` integer on the pages' device; 0 or less is padding. num_tokens: `[R]`
            integer on the pages' device, tokens that each page holds.
    """
    first, rotation = layers[0], layers[0].weights.rotation
    assert rotation is not None
    page, weights, pages = first.layout.pages[0], first.weights, first.pages
    if any(layer.pages.stride(0) != pages.stride(0) for layer in layers):
        for layer in layers:
            shift_layers([layer], state_indices, num_tokens)
        return
    schedule = rotation.schedule
    shape = layer_shape(first.layout, weights.num_heads, weights.rotated_map_after)
    table = head_table(layers)
    shift_kernel[(len(table), len(state_indices), NUM_PARTS)](
        pages, table, state_indices, num_tokens, rotation.cos, rotation.sin, pages.stride(0),
        state_indices.stride(0), num_tokens.stride(0), schedule.decay, schedule.score_decay_factor,
        SHAPE=shape, SCHEDULE=shift_shape(schedule, len(rotation.cos), page.head_dim),
        BLOCK_N=BLOCK_N, num_warps=NUM_WARPS,
    )  # fmt: skip


def shift_shape(schedule: ShiftSchedule, half: int, head_dim: int) -> ShiftShape:
    """A schedule for keys of `head_dim` numbers, `half` pairs of which are rotated."""
    shifts = -1 if schedule.score_decay_shifts is None else schedule.score_decay_shifts
    return ShiftShape(
        schedule.length,
        schedule.interval,
        schedule.bucket_start,
        shifts if schedule.score_decay else 0,
        half,
        triton.next_power_of_2(half),
        triton.next_power_of_2(max(1, head_dim - 2 * half)),
    )


def head_table(layers: Sequence[LayerState]) -> Tensor:
    """Where the KV heads of all layers are: `[layers * Hkv, NUM_FIELDS + 1]` int64 on the pages'
    device.

    Rows are those of `LayerState.table`, with offsets from the first layer's bytes. The last field
    is the head's number in its group.
    """
    pages = layers[0].pages
    offsets = tuple(layer.pages.data_ptr() - pages.data_ptr() for layer in layers)
    return _table_of(pages.device, tuple(layer.layout for layer in layers), offsets)


@functools.lru_cache(maxsize=256)  # of all layers of a model, and of each
def _table_of(
    device: torch.device, layouts: tuple[LayerLayout, ...], offsets: tuple[int, ...]
) -> Tensor:
    """`head_table`, copied to a device once."""
    rows, first_part = [], len(TABLE_FIELDS) - len(PARTS)
    for layout, offset in zip(layouts, offsets, strict=True):
        heads = layout.pages[0].num_kv_heads
        table = layout.table(layout.num_state_heads, False)  # of which shifts read sizes and parts
        own = torch.nn.functional.pad(table, (0, 1)).repeat_interleave(heads, 0)
        own[:, first_part:-1] += offset
        own[:, -1] = torch.arange(len(own)) % heads
        rows.append(own)
    table = torch.cat(rows)
    if device.type == "cuda":  # only pinned memory is copied without waiting
        table = table.pin_memory().to(device, non_blocking=True)
    return table
