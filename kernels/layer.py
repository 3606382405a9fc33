"""How kernels find a layer's parts: one launch serves all heads, one compilation all sizes.

KV heads whose sparse caches differ in size lie in pages of their own (`HeadGroup`), one after the
other in the layer's bytes. A program finds the row of its group in `LayerState.table`, and in it
sizes and byte offsets as numbers of run time. What all groups have in common is `SHAPE`, a
constexpr. Offsets within a part are 32-bit.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lola_vllm.core.ops.contract import LayerState
from lola_vllm.core.state import NEVER, PART_ALIGNMENT, TABLE_FIELDS, LayerLayout

MIN_DOT = 16  # smallest side of a tensor-core product
TILE_BYTES = 16 * 1024  # of keys, and as much of values; two of each are in flight
MAX_PAGE_BYTES = 2**31
# What kernels take: Triton's name for each.
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

NO_PAGE = tl.constexpr(NEVER)  # tokens that no page has
ALIGNED = tl.constexpr(PART_ALIGNMENT)
NUM_FIELDS = tl.constexpr(len(TABLE_FIELDS))
# Fields of a row of the table.
GROUP_KV_HEADS = tl.constexpr(TABLE_FIELDS.index("num_kv_heads"))
SPARSE_SIZE = tl.constexpr(TABLE_FIELDS.index("sparse_cache_size"))
RECENT_SIZE = tl.constexpr(TABLE_FIELDS.index("recent_size"))
FOLDS_AFTER = tl.constexpr(TABLE_FIELDS.index("folds_after"))
PART_H = tl.constexpr(TABLE_FIELDS.index("H"))
PART_S = tl.constexpr(TABLE_FIELDS.index("s"))
POSITIONS = tl.constexpr(TABLE_FIELDS.index("positions"))
SCORE_WEIGHTS = tl.constexpr(TABLE_FIELDS.index("score_weights"))
SPARSE_K_SCALE = tl.constexpr(TABLE_FIELDS.index("sparse_k_scale"))
SPARSE_V_SCALE = tl.constexpr(TABLE_FIELDS.index("sparse_v_scale"))
SPARSE_K = tl.constexpr(TABLE_FIELDS.index("sparse_k"))
SPARSE_V = tl.constexpr(TABLE_FIELDS.index("sparse_v"))
EXACT_K = tl.constexpr(TABLE_FIELDS.index("exact_k"))
EXACT_V = tl.constexpr(TABLE_FIELDS.index("exact_v"))


class LayerShape(NamedTuple):
    """What all groups of a layer have in common, as kernels take it: `SHAPE`, one constexpr.

    A field that is part of a tensor's shape goes through a local constexpr first: Triton 3.6 takes
    no plain int there.

    Attributes:
        WINDOW_SIZE, UPDATE_INTERVAL, SINK_SIZE, HEAD_DIM: as in `StateLayout`.
        FEATURE_DIM: F of the layer's maps, also where groups have no hidden state.
        NUM_HEADS, NUM_KV_HEADS, NUM_STATE_HEADS, NUM_SPARSE_HEADS: of the layer.
        HAS_SCORE_WEIGHTS, INT8_PAIRS: as in `StateLayout`, 1 or 0.
        KV_TYPE: of keys and values.
        ROTATED_MAP_AFTER: pages with more tokens map keys by the second of `LolaWeights.key_maps`;
            `NEVER`: there is one for all.
        RING_SIZE: rows of the window ring. STATES_PER_SET: state heads of a sparse set.
            SETS_PER_KV_HEAD: sparse sets of a KV head.
        BLOCK_D, BLOCK_F: powers of two, at least `HEAD_DIM` and `FEATURE_DIM`.
    """

    WINDOW_SIZE: int
    UPDATE_INTERVAL: int
    SINK_SIZE: int
    NUM_HEADS: int
    NUM_KV_HEADS: int
    NUM_STATE_HEADS: int
    NUM_SPARSE_HEADS: int
    HEAD_DIM: int
    FEATURE_DIM: int
    HAS_SCORE_WEIGHTS: int
    INT8_PAIRS: int
    KV_TYPE: Any
    ROTATED_MAP_AFTER: int
    RING_SIZE: int
    STATES_PER_SET: int
    SETS_PER_KV_HEAD: int
    BLOCK_D: int
    BLOCK_F: int


@functools.lru_cache(maxsize=1024)  # a few for each layer of a model
def layer_shape(layout: LayerLayout, num_heads: int, rotated_map_after: int = NEVER) -> LayerShape:
    """What every kernel takes of a layout.

    Args:
        num_heads: Hq of the layer. rotated_map_after: see `LayerShape`.
    """
    page = layout.pages[0]
    num_sets = sum(page.num_sparse_heads for page in layout.pages)
    return LayerShape(
        WINDOW_SIZE=page.window_size,
        UPDATE_INTERVAL=page.update_interval,
        SINK_SIZE=page.sink_size,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=layout.num_kv_heads,
        NUM_STATE_HEADS=layout.num_state_heads,
        NUM_SPARSE_HEADS=num_sets,
        HEAD_DIM=page.head_dim,
        FEATURE_DIM=layout.feature_dim,
        HAS_SCORE_WEIGHTS=int(page.has_score_weights),
        INT8_PAIRS=int(page.int8_pairs),
        KV_TYPE=DTYPES[page.kv_dtype],
        ROTATED_MAP_AFTER=rotated_map_after,
        RING_SIZE=page.ring_size,
        STATES_PER_SET=layout.num_state_heads // num_sets,
        SETS_PER_KV_HEAD=num_sets // layout.num_kv_heads,
        BLOCK_D=max(MIN_DOT, triton.next_power_of_2(page.head_dim)),
        BLOCK_F=max(MIN_DOT, triton.next_power_of_2(layout.feature_dim)),
    )


# --- addresses: the only places where a head's part of a page is found ---


@triton.jit
def group_of(table_ptr, kv_head):
    """The table's row of a KV head of the layer, and which of its group's heads it is."""
    heads = tl.load(table_ptr + GROUP_KV_HEADS).to(tl.int32)  # the same in all rows
    return table_ptr + kv_head // heads * NUM_FIELDS, kv_head % heads


@triton.jit
def part_of(page_at, group_at, PART: tl.constexpr, TYPE: tl.constexpr):
    """A part of a group's page. page_at: the layer's bytes, group_at: its row of the table."""
    offset = tl.multiple_of(tl.load(group_at + PART), ALIGNED)
    return (page_at + offset).to(tl.pointer_type(TYPE), bitcast=True)


@triton.jit
def num_entries(group_at):
    """Entries of each sparse set of a group, lam."""
    return tl.load(group_at + SPARSE_SIZE).to(tl.int32)


@triton.jit
def any_folded(group_at, start, SHAPE: tl.constexpr):
    """Whether something was folded in H and s of a group before its window began at `start`."""
    return start - SHAPE.SINK_SIZE > tl.load(group_at + FOLDS_AFTER).to(tl.int32)


@triton.jit
def h_of(page_at, group_at, head, SHAPE: tl.constexpr):
    """H of a state head of a group."""
    return part_of(page_at, group_at, PART_H, tl.float32) + head * (
        2 * SHAPE.FEATURE_DIM * SHAPE.HEAD_DIM
    )


@triton.jit
def s_of(page_at, group_at, head, SHAPE: tl.constexpr):
    """s of a state head of a group."""
    return part_of(page_at, group_at, PART_S, tl.float32) + head * 2 * SHAPE.FEATURE_DIM


@triton.jit
def exact_of(page_at, group_at, PART: tl.constexpr, kv_head, SHAPE: tl.constexpr):
    """Keys or values of sinks and window ring of a KV head of a group."""
    rows = SHAPE.SINK_SIZE + SHAPE.RING_SIZE
    return part_of(page_at, group_at, PART, SHAPE.KV_TYPE) + kv_head * rows * SHAPE.HEAD_DIM


@triton.jit
def pairs_of(page_at, group_at, PART: tl.constexpr, sparse_head, lam, SHAPE: tl.constexpr):
    """Keys or values of a sparse set of a group."""
    at = sparse_head * lam * SHAPE.HEAD_DIM
    if SHAPE.INT8_PAIRS:
        return part_of(page_at, group_at, PART, tl.int8) + at
    else:
        return part_of(page_at, group_at, PART, SHAPE.KV_TYPE) + at


@triton.jit
def entries_of(page_at, group_at, PART: tl.constexpr, sparse_head, lam):
    """One float32 per entry of a sparse set of a group: weights of scores, or scales."""
    return part_of(page_at, group_at, PART, tl.float32) + sparse_head * lam


@triton.jit
def map_of(w_ptr, head, SHAPE: tl.constexpr):
    """The feature map of a head of the layer."""
    return w_ptr + head * SHAPE.HEAD_DIM * SHAPE.FEATURE_DIM


@triton.jit
def first_key_map(n, SHAPE: tl.constexpr):
    """Where the maps begin of keys that hidden states take with the n-th token of their page."""
    first = 0
    if SHAPE.ROTATED_MAP_AFTER < NO_PAGE:
        first = tl.where(n > SHAPE.ROTATED_MAP_AFTER, SHAPE.NUM_STATE_HEADS, 0)
    return first


@triton.jit
def importance_weights_of(ws_ptr, kv_head, SHAPE: tl.constexpr):
    """Weights of the importance of a KV head of the layer: a `[d // 2]`, b `[d]` and c."""
    return ws_ptr + kv_head * (SHAPE.HEAD_DIM // 2 + SHAPE.HEAD_DIM + 1)


# --- positions ---


@triton.jit
def window_start(n, SHAPE: tl.constexpr):
    """First position of the window after n tokens: `StateLayout.window_start`."""
    C: tl.constexpr = SHAPE.UPDATE_INTERVAL
    return tl.maximum(n // C * C - SHAPE.WINDOW_SIZE, SHAPE.SINK_SIZE)


@triton.jit
def exact_row(position, SHAPE: tl.constexpr):
    """Row of the exact store that holds a position: `StateLayout.row`."""
    ring = SHAPE.SINK_SIZE + position % SHAPE.RING_SIZE
    return tl.where(position < SHAPE.SINK_SIZE, position, ring)


# --- host ---


def pairs_per_tile(layout: LayerLayout) -> int:
    """Keys and values that an attending program takes at a time, BLOCK_N."""
    page = layout.pages[0]
    width = max(MIN_DOT, triton.next_power_of_2(page.head_dim))
    return min(64, max(MIN_DOT, TILE_BYTES // (width * page.kv_dtype.itemsize)))


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied to answer queries of a dtype.

    TF32 keeps more bits than a 16-bit model's outputs have. Float32 models get three TF32 products
    of split operands, float32's accuracy on tensor cores.
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"


def check(layer: LayerState, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Whether the kernels can take the tensors.

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    page = layer.layout.pages[0]
    Hq, Hkv, d = layer.weights.num_heads, layer.layout.num_kv_heads, page.head_dim
    for name, tensor, shape in (
        ("q", q, (len(q), Hq, d)),
        ("k", k, (len(q), Hkv, d)),
        ("v", v, (len(q), Hkv, d)),
        ("out", out, (len(q), Hq, d)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected one of {tuple(DTYPES)}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous")
        if tensor.device != layer.pages.device:
            raise ValueError(f"{name}: on {tensor.device}, the pages on {layer.pages.device}")
    if page.kv_dtype not in DTYPES:
        raise ValueError(f"kv_dtype: {page.kv_dtype}, expected one of {tuple(DTYPES)}")
    if page.state_dtype != torch.float32:
        raise ValueError(f"state_dtype: {page.state_dtype}, expected torch.float32")
    if layer.layout.page_bytes >= MAX_PAGE_BYTES:
        raise ValueError(f"layout: pages of {layer.layout.page_bytes} bytes, 2 GiB or more")


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 on a CPU, where programs run one after another."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
