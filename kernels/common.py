"""What LoLA's Triton kernels share: feature maps, rounding, online softmax and the final mixture.

Sums are made in float32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from lola_vllm.core.ops import constants

FEATURE_BLOCK = tl.constexpr(16)

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
    """Dither of rows f of H and s in an update, for sums of 1 to below 2 (`core/ops/dither.py`)."""
    place = update.to(tl.uint32) * DITHER_UPDATE + f.to(tl.uint32) * DITHER_ROW
    return place.to(tl.int32, bitcast=True).to(tl.float32) * DITHER_UNIT


@triton.jit
def add_dithered(total, added, dither):
    """total + added, rounded with a dither (Lemma 3, `docs/bounds.md`)."""
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
    q, pairs_at, index, ok, cols, scale, m, norm, acc, SHAPE: tl.constexpr, PRECISION: tl.constexpr
):
    """`absorb` the sparse pairs in the entries `index` `[N]` that are ok, `[N]`; pairs_at: as in
    `candidates.set_at`."""
    k_at, v_at, k_scale_at, v_scale_at, _, _ = pairs_at
    at = index[:, None] * SHAPE.HEAD_DIM + cols[None, :]
    tile_ok = ok[:, None] & (cols < SHAPE.HEAD_DIM)[None, :]
    k = tl.load(k_at + at, mask=tile_ok, other=0)
    v = tl.load(v_at + at, mask=tile_ok, other=0)
    if not SHAPE.INT8_PAIRS:
        return absorb(q, k, v, ok[None, :], scale, m, norm, acc, PRECISION)
    else:
        k_scale = tl.load(k_scale_at + index, mask=ok, other=0.0)
        v_scale = tl.load(v_scale_at + index, mask=ok, other=0.0)
        k, v = k.to(tl.float32), v.to(tl.float32)
        return absorb_int8(q, k, v, k_scale, v_scale, ok, scale, m, norm, acc, SHAPE, PRECISION)


@triton.jit
def absorb_int8(
    q, k, v, k_scale, v_scale, ok, scale, m, norm, acc, SHAPE: tl.constexpr, PRECISION: tl.constexpr
):
    """`absorb` pairs whose numbers `[N, BLOCK_D]`, float32, stand for what their scales say.

    Numbers of 8 bits are multiplied as they are: every dtype holds them. The scales multiply logits
    and weights, those of values over the largest, so that 16 bits hold the weights.
    """
    k, v = k.to(SHAPE.KV_TYPE), v.to(SHAPE.KV_TYPE)
    z = tl.zeros([q.shape[0], k.shape[0]], tl.float32)
    z = product(q, tl.trans(k), z, PRECISION) * scale * k_scale[None, :]
    z = tl.where(ok[None, :], z, float("-inf"))
    top = tl.maximum(m, tl.max(z, 1))
    p = tl.exp(z - top[:, None])
    decay = tl.exp(m - top)
    largest = tl.max(v_scale, 0)
    share = v_scale / tl.where(largest > 0, largest, 1.0)
    more = tl.zeros([q.shape[0], v.shape[1]], tl.float32)
    more = product((p * share[None, :]).to(SHAPE.KV_TYPE), v, more, PRECISION)
    return top, norm * decay + tl.sum(p, 1), acc * decay[:, None] + more * largest


@triton.jit
def int8_scale(x):
    """The scales `[M]` of rows x `[M, N]`, float32: `quantize` in `core/ops/int8.py`."""
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
def mapped(x, w_ptr, by_head, cols, block, SHAPE: tl.constexpr, PRECISION: tl.constexpr):
    """xW `[M, len(block)]` of some columns of W, as of `read_state`."""
    F: tl.constexpr = SHAPE.FEATURE_DIM
    w_at = w_ptr + cols[:, None] * F + block[None, :]
    w_ok = (cols < SHAPE.HEAD_DIM)[:, None] & (block < F)[None, :]
    if by_head is None:
        w = tl.load(w_at, mask=w_ok, other=0.0)
        return product(x, w, tl.zeros([x.shape[0], block.shape[0]], tl.float32), PRECISION)
    else:  # the rows of each head by its own map, so that no product is of rows of others
        x_at, ok, stride, num_heads = by_head
        ROWS: tl.constexpr = x_at.shape[0]
        HEADS: tl.constexpr = x.shape[0] // ROWS
        heads = tl.arange(0, HEADS)[:, None, None]
        y = tl.zeros([HEADS, ROWS, block.shape[0]], tl.float32)
        for i in tl.range(0, num_heads, num_stages=1):
            rows = tl.load(x_at + i * stride, mask=ok, other=0.0)
            w = tl.load(w_at + i * SHAPE.HEAD_DIM * F, mask=w_ok, other=0.0)
            own = product(rows, w, tl.zeros([ROWS, block.shape[0]], tl.float32), PRECISION)
            y = tl.where(heads == i, own[None, :, :], y)
        return tl.reshape(y, [x.shape[0], block.shape[0]])


@triton.jit
def read_state(
    x, w_ptr, h_ptr, s_ptr, cols, num_features, SHAPE: tl.constexpr, PRECISION: tl.constexpr,
    by_head=None,
):  # fmt: skip
    """phi(x) H `[M, BLOCK_D]` and phi(x) s `[M]` of a state head, x `[M, BLOCK_D]`.

    Pointers are the head's. num_features is F, or 0 to count the state as zero and not read it.
    W and H are read in blocks of features, as whole ones would not fit the registers as operands.
    So y = xW is formed twice, once for the limits of its softmax.

    by_head: None, or where x holds rows of several query heads, head by head: pointers to those of
    the first `[rows, BLOCK_D]`, which of them are ok, the stride to the next head's, and how many
    heads there are. w_ptr is of the first then.
    """
    D: tl.constexpr = SHAPE.HEAD_DIM
    F: tl.constexpr = SHAPE.FEATURE_DIM
    col_ok = cols < D
    # Softmax limits of both halves first: y's maximum and -y's, and sums of exponentials.
    up_top = tl.full([x.shape[0]], float("-inf"), tl.float32)
    down_top = up_top
    up_norm = tl.zeros([x.shape[0]], tl.float32)
    down_norm = up_norm
    for f in tl.range(0, num_features, FEATURE_BLOCK, num_stages=1):
        block = f + tl.arange(0, FEATURE_BLOCK)
        ok = block < F
        y = mapped(x, w_ptr, by_head, cols, block, SHAPE, PRECISION)
        up_top, up_norm = widen(y, ok, up_top, up_norm)
        down_top, down_norm = widen(-y, ok, down_top, down_norm)

    acc = tl.zeros([x.shape[0], cols.shape[0]], tl.float32)
    z = tl.zeros([x.shape[0]], tl.float32)
    for f in tl.range(0, num_features, FEATURE_BLOCK, num_stages=1):
        block = f + tl.arange(0, FEATURE_BLOCK)
        ok = block < F
        y = mapped(x, w_ptr, by_head, cols, block, SHAPE, PRECISION)
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
    return acc, z


@triton.jit
def load_gate(gate_ptr, heads, ok):
    """Log gates of query heads (`LolaWeights.gates`)."""
    return tl.load(gate_ptr + 2 * heads, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load_sink(gate_ptr, heads, ok):
    """Logits of query heads' learned sinks (`LolaWeights.gates`)."""
    return tl.load(gate_ptr + 2 * heads + 1, mask=ok, other=float("-inf")).to(tl.float32)


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
