"""What LoLA's Triton kernels share: positions, feature maps, online softmax and the final mixture.

Kernels address a page by its index times the page stride (64 bits) plus an offset within the page,
whose parts are contiguous as `StateLayout.views` cuts them. Sums are made in float32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lola_vllm.ops import constants
from lola_vllm.ops.contract import HeadGroup
from lola_vllm.state import NEVER, StateLayout

MIN_DOT = 16  # smallest side of a tensor-core product
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE_BYTES = 16 * 1024  # of keys, and as much of values; two of each are in flight
MAX_PAGE_BYTES = 2**31  # offsets within a page are 32-bit

FEATURE_BLOCK = tl.constexpr(16)
NO_PAGE = tl.constexpr(NEVER)  # tokens that no page has

FEATURE_FLOOR = tl.constexpr(constants.FEATURE_FLOOR)
RECALL_EPS = tl.constexpr(constants.RECALL_EPS)
MAX_LOG_IMPORTANCE = tl.constexpr(constants.MAX_LOG_IMPORTANCE)
PAIR_MAX = tl.constexpr(float(constants.PAIR_MAX))
SCALE_STEP = tl.constexpr(1 / constants.PAIR_MAX)
WHOLE = tl.constexpr(1.5 * 2.0**23)  # a float32 sum with it is a whole number
DITHER_UPDATE = tl.constexpr(constants.DITHER_UPDATE)
DITHER_ROW = tl.constexpr(constants.DITHER_ROW)
DITHER_UNIT = tl.constexpr(constants.DITHER_UNIT)
EXPONENT_BITS = tl.constexpr(constants.EXPONENT_BITS)

# The interpreter multiplies bfloat16 operands as the integers that store them. Products of
# widened operands are what tensor cores compute, so there it widens first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class PageShape(NamedTuple):
    """A page's counts and the padded sides of tiles, as kernels take them: `SHAPE`, one constexpr.

    A field that is part of a tensor's shape goes through a local constexpr first: Triton 3.6 takes
    no plain int there.

    Attributes:
        WINDOW_SIZE, SPARSE_CACHE_SIZE, UPDATE_INTERVAL, SINK_SIZE, NUM_KV_HEADS, NUM_STATE_HEADS,
        NUM_SPARSE_HEADS, HEAD_DIM, FEATURE_DIM: as in `StateLayout`.
        HAS_SCORE_WEIGHTS, INT8_PAIRS: as in `StateLayout`, 1 or 0.
        ROTATED_MAP_AFTER: pages with more tokens map keys by the second of `LolaWeights.key_maps`;
            `NEVER`: there is one for all.
        RING_SIZE: rows of the window ring. STATES_PER_SET: state heads of a sparse set.
        BLOCK_D, BLOCK_F: powers of two, at least `HEAD_DIM` and `FEATURE_DIM`.
    """

    WINDOW_SIZE: int
    SPARSE_CACHE_SIZE: int
    RECENT_SIZE: int
    UPDATE_INTERVAL: int
    SINK_SIZE: int
    NUM_KV_HEADS: int
    NUM_STATE_HEADS: int
    NUM_SPARSE_HEADS: int
    HEAD_DIM: int
    FEATURE_DIM: int
    HAS_SCORE_WEIGHTS: int
    INT8_PAIRS: int
    ROTATED_MAP_AFTER: int
    RING_SIZE: int
    STATES_PER_SET: int
    BLOCK_D: int
    BLOCK_F: int


@functools.cache
def page_shape(layout: StateLayout, rotated_map_after: int = NEVER) -> PageShape:
    """What every kernel takes of a layout.

    Args:
        rotated_map_after: see `PageShape`.
    """
    return PageShape(
        WINDOW_SIZE=layout.window_size,
        SPARSE_CACHE_SIZE=layout.sparse_cache_size,
        RECENT_SIZE=layout.recent_size,
        UPDATE_INTERVAL=layout.update_interval,
        SINK_SIZE=layout.sink_size,
        NUM_KV_HEADS=layout.num_kv_heads,
        NUM_STATE_HEADS=layout.num_state_heads,
        NUM_SPARSE_HEADS=layout.num_sparse_heads,
        HEAD_DIM=layout.head_dim,
        FEATURE_DIM=layout.feature_dim,
        HAS_SCORE_WEIGHTS=int(layout.has_score_weights),
        INT8_PAIRS=int(layout.int8_pairs),
        ROTATED_MAP_AFTER=rotated_map_after,
        RING_SIZE=layout.ring_size,
        STATES_PER_SET=layout.num_state_heads // layout.num_sparse_heads,
        BLOCK_D=max(MIN_DOT, triton.next_power_of_2(layout.head_dim)),
        BLOCK_F=max(MIN_DOT, triton.next_power_of_2(layout.feature_dim)),
    )


# --- addresses: the only places where a head's part of a page is found ---


@triton.jit
def h_of(h_ptr, head, SHAPE: tl.constexpr):
    """H of a state head, from the page's."""
    return h_ptr + head * 2 * SHAPE.FEATURE_DIM * SHAPE.HEAD_DIM


@triton.jit
def s_of(s_ptr, head, SHAPE: tl.constexpr):
    """s of a state head, from the page's."""
    return s_ptr + head * 2 * SHAPE.FEATURE_DIM


@triton.jit
def map_of(w_ptr, head, SHAPE: tl.constexpr):
    """The feature map of a head."""
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
    """Weights of the importance of a KV head: a `[d // 2]`, b `[d]` and c."""
    return ws_ptr + kv_head * (SHAPE.HEAD_DIM // 2 + SHAPE.HEAD_DIM + 1)


@triton.jit
def exact_of(exact_ptr, kv_head, SHAPE: tl.constexpr):
    """Sinks and window ring of a KV head, from the page's keys or values."""
    return exact_ptr + kv_head * (SHAPE.SINK_SIZE + SHAPE.RING_SIZE) * SHAPE.HEAD_DIM


@triton.jit
def entries_of(ptr, sparse_head, SHAPE: tl.constexpr):
    """One number per entry of a sparse set, from the page's positions, importance or scales."""
    return ptr + sparse_head * SHAPE.SPARSE_CACHE_SIZE


@triton.jit
def pairs_of(ptr, sparse_head, SHAPE: tl.constexpr):
    """Keys or values of a sparse set, or directions of a state head, from the page's."""
    return ptr + sparse_head * SHAPE.SPARSE_CACHE_SIZE * SHAPE.HEAD_DIM


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


# --- feature maps, rounding, attention ---


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; operands of different dtypes meet in float32."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    elif a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def features(y, feature_ok):
    """One half of the feature map, softmax(y) of at least `FEATURE_FLOOR`.

    y is xW `[M, BLOCK_F]` for the first half, -xW for the second. Columns past F are zero.
    """
    y = tl.where(feature_ok[None, :], y, float("-inf"))
    top = tl.max(y, 1)
    return clamped_exp(y, top, tl.sum(tl.exp(y - top[:, None]), 1), feature_ok)


@triton.jit
def widen(y, ok, top, norm):
    """Softmax limits `[M]` (maximum, sum of exponentials), with some more columns of y."""
    y = tl.where(ok[None, :], y, float("-inf"))
    new_top = tl.maximum(top, tl.max(y, 1))
    new_norm = norm * tl.exp(top - new_top) + tl.sum(tl.exp(y - new_top[:, None]), 1)
    return new_top, new_norm


@triton.jit
def clamped_exp(y, top, norm, feature_ok):
    """Some columns of a feature map's half, from the softmax limits of all of them."""
    phi = tl.exp(y - top[:, None]) / norm[:, None]
    # `where` and not `maximum`, which could drop a NaN.
    return tl.where(feature_ok[None, :], tl.where(phi < FEATURE_FLOOR, FEATURE_FLOOR, phi), 0.0)


@triton.jit
def dither(update, f):
    """Dither of rows f of H and s in an update, for sums from 1 to below 2 (`ops/dither.py`)."""
    place = update.to(tl.uint32) * DITHER_UPDATE + f.to(tl.uint32) * DITHER_ROW
    return place.to(tl.int32, bitcast=True).to(tl.float32) * DITHER_UNIT


@triton.jit
def add_dithered(total, added, dither):
    """total + added, rounded with a dither (Lemma 4, `docs/bounds.md`)."""
    power = (total.to(tl.int32, bitcast=True) & EXPONENT_BITS).to(tl.float32, bitcast=True)
    return total + (added + power * dither)


@triton.jit
def absorb(q, k, v, ok, scale, m, norm, acc, PRECISION: tl.constexpr):
    """Online softmax: add a tile of pairs to the running maximum, sum and weighted values.

    q and acc `[M, BLOCK_D]`, k and v `[N, BLOCK_D]`, ok `[1 or M, N]`, m and norm `[M]`.
    Every query must see a pair of this tile or of an earlier one.
    """
    z = product(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32), PRECISION) * scale
    z = tl.where(ok, z, float("-inf"))
    top = tl.maximum(m, tl.max(z, 1))
    p = tl.exp(z - top[:, None])
    decay = tl.exp(m - top)
    acc = product(p.to(v.dtype), v, acc * decay[:, None], PRECISION)
    return top, norm * decay + tl.sum(p, 1), acc


@triton.jit
def absorb_cached(
    q, k_at, v_at, k_scale_at, v_scale_at, index, ok, cols, scale, m, norm, acc,
    kv_type: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`absorb` the sparse pairs in the entries `index` `[N]` that are ok, `[N]`; pointers: the
    set's.

    kv_type: of the page's exact keys and values.
    """
    at = index[:, None] * SHAPE.HEAD_DIM + cols[None, :]
    tile_ok = ok[:, None] & (cols < SHAPE.HEAD_DIM)[None, :]
    k = tl.load(k_at + at, mask=tile_ok, other=0)
    v = tl.load(v_at + at, mask=tile_ok, other=0)
    if not SHAPE.INT8_PAIRS:
        return absorb(q, k, v, ok[None, :], scale, m, norm, acc, PRECISION)
    else:
        # Numbers of 8 bits are multiplied as they are: every dtype holds them. The scales multiply
        # logits and weights, those of values over the largest, so that 16 bits hold the weights.
        k_scale = tl.load(k_scale_at + index, mask=ok, other=0.0)
        v_scale = tl.load(v_scale_at + index, mask=ok, other=0.0)
        k, v = k.to(tl.float32).to(kv_type), v.to(tl.float32).to(kv_type)
        z = tl.zeros([q.shape[0], k.shape[0]], tl.float32)
        z = product(q, tl.trans(k), z, PRECISION) * scale * k_scale[None, :]
        z = tl.where(ok[None, :], z, float("-inf"))
        top = tl.maximum(m, tl.max(z, 1))
        p = tl.exp(z - top[:, None])
        decay = tl.exp(m - top)
        largest = tl.max(v_scale, 0)
        share = v_scale / tl.where(largest > 0, largest, 1.0)
        more = tl.zeros([q.shape[0], cols.shape[0]], tl.float32)
        more = product((p * share[None, :]).to(kv_type), v, more, PRECISION)
        return top, norm * decay + tl.sum(p, 1), acc * decay[:, None] + more * largest


@triton.jit
def int8_scale(x):
    """The scales `[M]` of rows x `[M, N]`, float32: `quantize` in `ops/int8.py`."""
    # The second sum is 0, or NaN where an entry is not finite.
    return tl.max(tl.abs(x), 1) * SCALE_STEP + tl.sum(x - x, 1)


@triton.jit
def int8_numbers(x, scale):
    """The numbers that rows x are rounded to at their scales, in float32."""
    usable = scale > 0
    y = tl.div_rn(x, tl.where(usable, scale, 1.0)[:, None])
    y = (y + WHOLE) - WHOLE
    y = tl.minimum(tl.maximum(y, -PAIR_MAX), PAIR_MAX)
    return tl.where(usable[:, None], y, 0.0)


@triton.jit
def read_state(
    x, w_ptr, h_ptr, s_ptr, cols, num_features, SHAPE: tl.constexpr, PRECISION: tl.constexpr
):
    """phi(x) H `[M, BLOCK_D]`, phi(x) s and ||phi(x)||^2 `[M]` of one head, x `[M, BLOCK_D]`.

    Pointers are the head's. num_features is F, or 0 to count the state as zero and not read it.
    W and H are read in blocks of features, as whole ones would not fit the registers as operands.
    So y = xW is formed twice, once for the limits of its softmax.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    F: tl.constexpr = SHAPE.FEATURE_DIM
    col_ok = cols < D
    w_at = w_ptr + cols[:, None] * F
    none = tl.zeros([x.shape[0], FEATURE_BLOCK], tl.float32)
    # Softmax limits of both halves first: y's maximum and -y's, and sums of exponentials.
    up_top = tl.full([x.shape[0]], float("-inf"), tl.float32)
    down_top = up_top
    up_norm = tl.zeros([x.shape[0]], tl.float32)
    down_norm = up_norm
    for f in tl.range(0, num_features, FEATURE_BLOCK, num_stages=1):
        block = f + tl.arange(0, FEATURE_BLOCK)
        ok = block < F
        w = tl.load(w_at + block[None, :], mask=col_ok[:, None] & ok[None, :], other=0.0)
        y = product(x, w, none, PRECISION)
        up_top, up_norm = widen(y, ok, up_top, up_norm)
        down_top, down_norm = widen(-y, ok, down_top, down_norm)

    acc = tl.zeros([x.shape[0], cols.shape[0]], tl.float32)
    z = tl.zeros([x.shape[0]], tl.float32)
    square = z
    for f in tl.range(0, num_features, FEATURE_BLOCK, num_stages=1):
        block = f + tl.arange(0, FEATURE_BLOCK)
        ok = block < F
        w = tl.load(w_at + block[None, :], mask=col_ok[:, None] & ok[None, :], other=0.0)
        y = product(x, w, none, PRECISION)
        h_at = h_ptr + block[:, None] * D + cols[None, :]
        h_ok = ok[:, None] & col_ok[None, :]
        up = clamped_exp(y, up_top, up_norm, ok)
        h = tl.load(h_at, mask=h_ok, other=0.0)
        acc = product(up, h, acc, PRECISION)
        s = tl.load(s_ptr + block, mask=ok, other=0.0)
        z += tl.sum(up * s[None, :], 1)
        down = clamped_exp(-y, down_top, down_norm, ok)
        h = tl.load(h_at + F * D, mask=h_ok, other=0.0)
        acc = product(down, h, acc, PRECISION)
        s = tl.load(s_ptr + F + block, mask=ok, other=0.0)
        z += tl.sum(down * s[None, :], 1)
        square += tl.sum(up * up + down * down, 1)
    return acc, z, square


@triton.jit
def mix(m, norm, y_soft, y_lin, log_D, log_gate, SUBTRACT_MAX: tl.constexpr):
    """The common-denominator mixture (`docs/algorithm.md`, section 4), without raw exponentials.

    An empty hidden state is log_D = -inf and y_lin = 0, which leaves y_soft.
    """
    lse = tl.log(norm)
    if not SUBTRACT_MAX:
        lse += m
    r = 1.0 / (1.0 + tl.exp(log_D - lse - log_gate))
    return r[:, None] * y_soft + (1.0 - r)[:, None] * y_lin


def pairs_per_tile(layout: StateLayout) -> int:
    """Keys and values that an attending program takes at a time, BLOCK_N."""
    row = page_shape(layout).BLOCK_D * layout.kv_dtype.itemsize
    return min(64, max(MIN_DOT, TILE_BYTES // row))


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied to answer queries of a dtype.

    TF32 keeps more bits than a 16-bit model's outputs have. Float32 models get three TF32 products
    of split operands, float32's accuracy on tensor cores.
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"


class PageStrides(NamedTuple):
    """Strides of a pool's pages, in elements.

    Attributes:
        state: of H and s. kv: of exact keys and values. sparse: of those in the sparse cache.
            words: of positions, importance, scales and bounds. bytes: of directions.
    """

    state: int
    kv: int
    sparse: int
    words: int
    bytes: int


def page_strides(group: HeadGroup) -> PageStrides:
    """The page stride of a layer's pool, in elements of each part."""
    stride, layout = group.pages.stride(0), group.layout
    return PageStrides(
        stride // layout.state_dtype.itemsize, stride // layout.kv_dtype.itemsize,
        stride // layout.sparse_dtype.itemsize, stride // 4, stride,
    )  # fmt: skip


def check(group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Whether the kernels can take the tensors.

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    layout = group.layout
    Hq, Hkv, d = group.weights.num_heads, layout.num_kv_heads, layout.head_dim
    for name, tensor, shape in (
        ("q", q, (len(q), Hq, d)),
        ("k", k, (len(q), Hkv, d)),
        ("v", v, (len(q), Hkv, d)),
        ("out", out, (len(q), Hq, d)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected one of {DTYPES}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous")
        if tensor.device != group.pages.device:
            raise ValueError(f"{name}: on {tensor.device}, the pages on {group.pages.device}")
    if layout.kv_dtype not in DTYPES:
        raise ValueError(f"kv_dtype: {layout.kv_dtype}, expected one of {DTYPES}")
    if layout.state_dtype != torch.float32:
        raise ValueError(f"state_dtype: {layout.state_dtype}, expected torch.float32")
    if layout.page_bytes >= MAX_PAGE_BYTES:
        raise ValueError(f"layout: pages of {layout.page_bytes} bytes, 2 GiB or more")


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 on a CPU, where programs run one after another."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
