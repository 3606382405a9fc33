"""Self-recall errors in Triton: the GPU twin of `lola::sre_scores` (LoLA, arXiv 2505.23666).

One program scores a block of candidates of one row and sparse set. Per state head it forms
y = k W, both softmaxes and the product with H in two halves, so H is read once per block.
Sums are made in float32, and so are products: the order of the scores decides which pairs stay
exact, so plain TF32 (10 bits of mantissa) will not do.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_DOT = 16  # smallest side of a tensor-core product
BLOCK_E = 32  # candidates per program
# Products of float32 as three TF32 products of split operands: float32's accuracy on tensor cores.
# "ieee" instead unrolls into thousands of scalar multiply-adds.
PRECISION = "tf32x3"


@triton.jit
def sre_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    v_ptr,
    w_ptr,
    h_ptr,
    s_ptr,
    slots_ptr,
    empty_ptr,
    out_ptr,
    E,
    k_row,
    k_set,
    k_e,
    v_row,
    v_set,
    v_e,
    w_head,
    w_d,
    h_page,
    h_head,
    h_f,
    s_page,
    s_head,
    num_sets,
    d: tl.constexpr,
    F: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores `[B, Hg, E]` of one block: grid (B * Hg, cdiv(E, BLOCK)); SHARE = Hs // Hg.

    Strides are in elements and the last dimension of every tensor is contiguous.
    """
    row = (tl.program_id(0) // num_sets).to(tl.int64)
    group = (tl.program_id(0) % num_sets).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    feats = tl.arange(0, BLOCK_F)
    e_ok, col_ok, feat_ok = e < E, cols < d, feats < F
    e64 = e.to(tl.int64)

    page = tl.load(slots_ptr + row).to(tl.int64)
    live = (tl.load(empty_ptr + row) == 0) & (page >= 0)
    k_ok = e < tl.where(live, E, 0)  # a row without a state needs no features
    state_ok = feats < tl.where(live, F, 0)
    k_at = k_ptr + row * k_row + group * k_set + e64[:, None] * k_e + cols[None, :]
    v_at = v_ptr + row * v_row + group * v_set + e64[:, None] * v_e + cols[None, :]
    k = tl.load(k_at, mask=k_ok[:, None] & col_ok[None, :], other=0.0).to(tl.float32)
    v = tl.load(v_at, mask=e_ok[:, None] & col_ok[None, :], other=0.0).to(tl.float32)

    norm = tl.sqrt(tl.sum(v * v, 1))
    total = tl.zeros([BLOCK], tl.float32)
    # One stage: prefetching the next head's W and H would not fit shared memory at d = 128.
    for i in tl.range(0, SHARE, num_stages=1):
        head = group * SHARE + i
        w_at = w_ptr + head * w_head + cols[:, None].to(tl.int64) * w_d + feats[None, :]
        w = tl.load(w_at, mask=col_ok[:, None] & feat_ok[None, :], other=0.0)
        if k_ptr.dtype.element_ty == tl.bfloat16 and w_ptr.dtype.element_ty == tl.bfloat16:
            # TF32 holds a bfloat16 exactly, so one product is enough.
            y = tl.dot(k, w.to(tl.float32), input_precision="tf32")
        else:
            y = tl.dot(k, w.to(tl.float32), input_precision=PRECISION)
        up = tl.where(feat_ok[None, :], y, float("-inf"))
        down = tl.where(feat_ok[None, :], -y, float("-inf"))
        up = tl.exp(up - tl.max(up, 1)[:, None])
        down = tl.exp(down - tl.max(down, 1)[:, None])
        up = up / tl.sum(up, 1)[:, None]
        down = down / tl.sum(down, 1)[:, None]
        # Clamped from below as in LoLCATs; `where` and not `maximum`, which could drop a NaN.
        up = tl.where(feat_ok[None, :], tl.where(up < 1e-12, 1e-12, up), 0.0)
        down = tl.where(feat_ok[None, :], tl.where(down < 1e-12, 1e-12, down), 0.0)

        h_at = h_ptr + page * h_page + head * h_head
        h_at = h_at + feats[:, None].to(tl.int64) * h_f + cols[None, :]
        h_ok = state_ok[:, None] & col_ok[None, :]
        h_up = tl.load(h_at, mask=h_ok, other=0.0)
        h_down = tl.load(h_at + F * h_f, mask=h_ok, other=0.0)
        s_at = s_ptr + page * s_page + head * s_head + feats
        s_up = tl.load(s_at, mask=state_ok, other=0.0)
        s_down = tl.load(s_at + F, mask=state_ok, other=0.0)

        predicted = tl.dot(up, h_up, input_precision=PRECISION)
        predicted = tl.dot(down, h_down, predicted, input_precision=PRECISION)
        z = tl.sum(up * s_up[None, :], 1) + tl.sum(down * s_down[None, :], 1) + 1e-6
        diff = v - predicted / z[:, None]
        error = tl.sqrt(tl.sum(diff * diff, 1))
        if SHARE > 1:
            # Divided before it is summed: against an empty state every ratio is exactly 1, and
            # the tie is the older pair's.
            error = tl.div_rn(error, tl.where(norm < 1e-6, 1e-6, norm))
        total += error

    if SHARE > 1:
        total = tl.div_rn(total, SHARE * 1.0)
    tl.store(out_ptr + (row * num_sets + group) * E + e64, total, mask=e_ok)


def sre_scores(
    k: Tensor, v: Tensor, feature_map_k: Tensor, H: Tensor, s: Tensor, slots: Tensor, empty: Tensor
) -> Tensor:
    """Self-recall errors of candidates (paper section 3.2) on a GPU.

    Args:
        k, v: `[B, Hg, E, d]`, float32 or bfloat16, k after RoPE.
        feature_map_k: `[Hs, d, F]`; state head h belongs to sparse set `h // (Hs // Hg)`.
        H: `[N, Hs, 2F, d]`. s: `[N, Hs, 2F]`, float32, any page stride.
        slots: `[B]`, int32 or int64, page of each row (< N); a negative one counts as an empty
            state.
        empty: `[B]`, bool; the state counts as zero and its bytes are not read.

    Returns:
        `[B, Hg, E]` float32: the SRE where Hg = Hs, else the mean over the set's state heads of
        SRE / max(||v||, 1e-6).

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    _check(k, v, feature_map_k, H, s, slots, empty)
    B, Hg, E, d = k.shape
    Hs, _, F = feature_map_k.shape
    out = torch.empty(B, Hg, E, dtype=torch.float32, device=k.device)
    if out.numel() == 0:
        return out
    sre_kernel[(B * Hg, triton.cdiv(E, BLOCK_E))](
        k, v, feature_map_k, H, s,
        slots.contiguous(), empty.contiguous().view(torch.uint8), out, E,
        k.stride(0), k.stride(1), k.stride(2),
        v.stride(0), v.stride(1), v.stride(2),
        feature_map_k.stride(0), feature_map_k.stride(1),
        H.stride(0), H.stride(1), H.stride(2),
        s.stride(0), s.stride(1),
        Hg,
        **constants(d, F, Hs // Hg),
    )  # fmt: skip
    return out


def constants(d: int, F: int, share: int) -> dict[str, int | str]:
    """The kernel's compile-time arguments for a head size, a feature size and Hs // Hg."""
    return {
        "d": d,
        "F": F,
        "SHARE": share,
        "BLOCK": BLOCK_E,
        "BLOCK_D": max(MIN_DOT, triton.next_power_of_2(d)),
        "BLOCK_F": max(MIN_DOT, triton.next_power_of_2(F)),
        "PRECISION": PRECISION,
    }


def _check(
    k: Tensor, v: Tensor, feature_map_k: Tensor, H: Tensor, s: Tensor, slots: Tensor, empty: Tensor
) -> None:
    """Raise ValueError, naming the argument, unless everything fits."""
    if k.dim() != 4 or feature_map_k.dim() != 3:
        name, tensor = ("k", k) if k.dim() != 4 else ("feature_map_k", feature_map_k)
        raise ValueError(f"{name}: shape {list(tensor.shape)}, expected [B, Hg, E, d] / [Hs, d, F]")
    B, Hg, E, d = k.shape
    Hs, _, F = feature_map_k.shape
    if Hg < 1 or Hs % Hg or Hs < 1:
        raise ValueError(f"feature_map_k: {Hs} state heads, not a multiple of {Hg} sparse sets")
    expected = {
        "v": (v, (B, Hg, E, d), k.dtype),
        "feature_map_k": (feature_map_k, (Hs, d, F), None),
        "H": (H, (H.shape[0], Hs, 2 * F, d), torch.float32),
        "s": (s, (H.shape[0], Hs, 2 * F), torch.float32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {list(shape)}")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected {dtype}")
    for name, tensor in {"k": k, **{n: x[0] for n, x in expected.items()}}.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected float32 or bfloat16")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous")
    for name, tensor, dtypes in (
        ("slots", slots, (torch.int32, torch.int64)),
        ("empty", empty, (torch.bool,)),
    ):
        if tuple(tensor.shape) != (B,) or tensor.dtype not in dtypes:
            raise ValueError(
                f"{name}: {list(tensor.shape)} of {tensor.dtype}, expected [{B}] of {dtypes}"
            )
    if k.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("k: is on the CPU; Triton kernels need a GPU (or TRITON_INTERPRET=1)")
