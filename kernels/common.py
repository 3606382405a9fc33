"""What LoLA's Triton kernels share: positions, feature maps, online softmax and the final mixture.

Kernels address a page by its index times the page stride (64 bits) plus an offset within the page,
whose parts are contiguous as `StateLayout.views` cuts them. Sums are made in float32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lola_vllm.ops.contract import LolaWeights
from lola_vllm.state import StateLayout, StateViews

MIN_DOT = 16  # smallest side of a tensor-core product
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_PAGE_BYTES = 2**31  # offsets within a page are 32-bit

# The interpreter multiplies bfloat16 operands as the integers that store them. Products of
# widened operands are what tensor cores compute, so there it widens first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def window_start(n, C: tl.constexpr, ETA: tl.constexpr, SINK: tl.constexpr):
    """First position of the window after n tokens: `StateLayout.window_start`."""
    return tl.maximum(n // C * C - ETA, SINK)


@triton.jit
def exact_row(position, C: tl.constexpr, ETA: tl.constexpr, SINK: tl.constexpr):
    """Row of the exact store that holds a position: `StateLayout.row`."""
    return tl.where(position < SINK, position, SINK + position % (ETA + C))


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
    """One half of the feature map, clamp(softmax(y), min=1e-12): of y = xW `[M, BLOCK_F]`, or -y.

    Columns past F are zero.
    """
    y = tl.where(feature_ok[None, :], y, float("-inf"))
    e = tl.exp(y - tl.max(y, 1)[:, None])
    phi = e / tl.sum(e, 1)[:, None]
    # `where` and not `maximum`, which could drop a NaN.
    return tl.where(feature_ok[None, :], tl.where(phi < 1e-12, 1e-12, phi), 0.0)


@triton.jit
def absorb(q, k, v, ok, scale, m, l, acc, PRECISION: tl.constexpr):
    """Online softmax: add a tile of pairs to the running maximum, sum and weighted values.

    q `[M, BLOCK_D]`, k and v `[N, BLOCK_D]`, ok `[1 or M, N]`, m and l `[M]`, acc `[M, BLOCK_D]`.
    Every query must see a pair of this tile or of an earlier one.
    """
    z = product(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32), PRECISION) * scale
    z = tl.where(ok, z, float("-inf"))
    top = tl.maximum(m, tl.max(z, 1))
    p = tl.exp(z - top[:, None])
    decay = tl.exp(m - top)
    acc = product(p.to(v.dtype), v, acc * decay[:, None], PRECISION)
    return top, l * decay + tl.sum(p, 1), acc


@triton.jit
def read_out(phi_up, phi_down, h_at, s_at, tile_ok, feature_ok, F_STRIDE, F, PRECISION):
    """Linear read-out: y_lin = phi H / (phi s) `[M, BLOCK_D]` and log(phi s) `[M]`.

    h_at `[BLOCK_F, BLOCK_D]` and s_at `[BLOCK_F]` point at the first half of the features.
    """
    acc = tl.zeros([phi_up.shape[0], tile_ok.shape[1]], tl.float32)
    h = tl.load(h_at, mask=tile_ok, other=0.0).to(tl.float32)
    acc = product(phi_up, h, acc, PRECISION)
    h = tl.load(h_at + F * F_STRIDE, mask=tile_ok, other=0.0).to(tl.float32)
    acc = product(phi_down, h, acc, PRECISION)
    s = tl.load(s_at, mask=feature_ok, other=0.0).to(tl.float32)
    D = tl.sum(phi_up * s[None, :], 1)
    s = tl.load(s_at + F, mask=feature_ok, other=0.0).to(tl.float32)
    D += tl.sum(phi_down * s[None, :], 1)
    return acc / D[:, None], tl.log(D)


@triton.jit
def mix(m, l, y_soft, y_lin, log_D, log_gate, SUBTRACT_MAX: tl.constexpr):
    """The common-denominator mixture (`docs/algorithm.md`, section 4), without raw exponentials.

    An empty hidden state is log_D = -inf and y_lin = 0, which leaves y_soft.
    """
    lse = tl.log(l)
    if not SUBTRACT_MAX:
        lse += m
    r = 1.0 / (1.0 + tl.exp(log_D - lse - log_gate))
    return r[:, None] * y_soft + (1.0 - r)[:, None] * y_lin


def constants(layout: StateLayout) -> dict[str, int]:
    """Compile-time arguments of every kernel: the page's shape and the padded tile sides."""
    return {
        "D": layout.head_dim,
        "F": layout.feature_dim,
        "ETA": layout.window_size,
        "LAM": layout.sparse_cache_size,
        "C": layout.update_interval,
        "SINK": layout.sink_size,
        "HKV": layout.num_kv_heads,
        "HS": layout.num_state_heads,
        "HG": layout.num_sparse_heads,
        "BLOCK_D": max(MIN_DOT, triton.next_power_of_2(layout.head_dim)),
        "BLOCK_F": max(MIN_DOT, triton.next_power_of_2(layout.feature_dim)),
    }


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied to answer queries of a dtype.

    TF32 keeps more bits than a 16-bit model's outputs have. Float32 models get three TF32 products
    of split operands, float32's accuracy on tensor cores.
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"


def page_strides(views: StateViews) -> tuple[int, int, int]:
    """Page strides in elements of H and s, of all keys and values, and of the positions.

    Raises:
        ValueError: parts that do not share a pool's page stride, or that are not contiguous.
    """
    # A part without entries (lam = 0) is never addressed, and has a stride of its own.
    parts = {name: part for name, part in views._asdict().items() if part[0].numel()}
    pool = views.H.stride(0) * views.H.itemsize
    for name, part in parts.items():
        if part.stride(0) * part.itemsize != pool:
            raise ValueError(f"{name}: page stride {part.stride(0)}, expected {pool} bytes")
        if not part[0].is_contiguous():
            raise ValueError(f"{name}: must be contiguous within a page")
    return views.H.stride(0), views.exact_k.stride(0), pool // views.positions.itemsize


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: LolaWeights,
    layout: StateLayout,
    views: StateViews,
    out: Tensor,
) -> None:
    """Raise ValueError, naming the argument, unless the kernels can take the tensors."""
    Hq, d, F = q.shape[1], layout.head_dim, layout.feature_dim
    Hkv, Hs = layout.num_kv_heads, layout.num_state_heads
    for name, tensor, shape in (
        ("q", q, (len(q), Hq, d)),
        ("k", k, (len(q), Hkv, d)),
        ("v", v, (len(q), Hkv, d)),
        ("out", out, (len(q), Hq, d)),
        ("feature_map_q", weights.feature_map_q, (Hq, d, F)),
        ("feature_map_k", weights.feature_map_k, (Hs, d, F)),
        ("log_gate", weights.log_gate, (Hq,)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected one of {DTYPES}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous")
        if tensor.device != views.H.device:
            raise ValueError(f"{name}: on {tensor.device}, the pages on {views.H.device}")
    for name, tensor in (("H", views.H), ("exact_k", views.exact_k)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected one of {DTYPES}")
    for name in ("feature_map_q", "feature_map_k", "log_gate"):
        if not getattr(weights, name).is_contiguous():
            raise ValueError(f"{name}: must be contiguous")
    if Hq % Hs:
        raise ValueError(f"q: {Hq} heads, not a multiple of {Hs} state heads")
    if layout.page_bytes >= MAX_PAGE_BYTES:
        raise ValueError(f"layout: pages of {layout.page_bytes} bytes, 2 GiB or more")


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 on a CPU, where the interpreter runs in turn."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
