"""Prefill whose softmax part is attended by xformers (`LOLA_VLLM_OPS=xformers`).

What a query sees of its own chunk, the window and the sinks hangs on no update. So all chunks of a
batch are attended to those pairs in one call, before the first step, on copies that lie in a row;
the steps' kernel goes on from the output and its log-sum-exp with the sparse cache and the hidden
state, as partial attentions are merged (arXiv 2402.05099). Triton attends prompts from their first
tokens on, of few rows, without it (`attend.attends_apart`). Importing this module imports xformers.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xformers.ops import fmha

from lola_vllm.core.ops.contract import LayerState, PrefillBatch
from lola_vllm.core.state import StateLayout
from lola_vllm.kernels import backend
from lola_vllm.kernels.chunks import Ints, plan_chunks
from lola_vllm.kernels.prefill import on_device
from lola_vllm.kernels.warmup import warm_up as warm_up_with

logger = logging.getLogger("vllm.lola")

# What xformers' kernels with a log-sum-exp, Flash-Attention's, take.
DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8
# Copies made of a pair beside the one in its own chunk, about (eta + sinks) / C. With C = 1 each
# token would bring its whole window.
MAX_COPIES = 4


@dataclass(frozen=True)
class Gather:
    """The pairs that the chunks of a ragged batch see, chunk by chunk in the order of the tokens.

    Attributes:
        tokens, pairs: `[P]`: of each chunk, new tokens and pairs it sees (sinks, window, itself).
        source: `[N]`: each pair's token in the batch, 0 where it comes from a page.
        stored: `[3, M]`: of those from pages, which of the N, batch row, row of the exact store.
    """

    tokens: Ints
    pairs: Ints
    source: Ints
    stored: Ints


def plan_gather(query_start_loc: Ints, context_lens: Ints, layout: StateLayout) -> Gather:
    """Plan it from counts alone; query_start_loc `[R + 1]`, context_lens `[R]`."""
    token, position, length, row = plan_chunks(query_start_loc, context_lens, layout)
    start = layout.window_start(torch.from_numpy(position)).numpy()
    window = np.minimum(start, position)  # where it starts
    sinks = np.minimum(position, layout.sink_size)
    pairs = sinks + position - window + length

    chunk = np.repeat(np.arange(len(token)), pairs)
    nth = np.arange(len(chunk)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    at = np.where(nth < sinks[chunk], nth, (window - sinks)[chunk] + nth)  # its position
    source = (token - position)[chunk] + at
    old = np.flatnonzero(at < context_lens[row[chunk]])
    source[old] = 0
    exact = layout.row(torch.from_numpy(at[old])).numpy()
    return Gather(length, pairs, source, np.stack([old, row[chunk][old], exact]))


@functools.cache
def _window_of(page: StateLayout) -> StateLayout:
    """The same for all layers and heads of a model: what `plan_gather` asks is of the window."""
    return replace(page, sparse_cache_size=0, recent_size=0)


@functools.lru_cache(maxsize=4)
def _gather_on(
    device: torch.device, layout: StateLayout, query_start_loc: bytes, context_lens: bytes
) -> tuple[Any, Tensor, Tensor]:
    """xformers' mask, `source` and `stored` on a device, made once for all layers of a step."""
    plan = plan_gather(
        np.frombuffer(query_start_loc, np.int64), np.frombuffer(context_lens, np.int64), layout
    )
    mask = fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
        plan.tokens.tolist(), plan.pairs.tolist(), device=device
    )
    return mask, on_device(plan.source, device), on_device(plan.stored, device)


def attend(
    layer: LayerState, q: Tensor, k: Tensor, v: Tensor, batch: PrefillBatch
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every token to its chunk, window and sinks: a `prefill.SoftmaxPart`.

    Args:
        layer, q, k, v, batch: as in `contract.PrefillOp`.

    Returns:
        `[T, Hq, d]` in the model's dtype, and its log-sum-exp `[Hq, T]` in float32.

    Raises:
        RuntimeError: xformers has no kernel for this GPU.
    """
    mask, source, (at, row, exact) = _gather_on(
        q.device,
        _window_of(layer.layout.pages[0]),
        batch.query_start_loc.numpy().astype(np.int64).tobytes(),
        batch.context_lens.numpy().astype(np.int64).tobytes(),
    )
    T, Hq, d = q.shape
    Hkv = layer.layout.num_kv_heads
    page = batch.state_indices.index_select(0, row).long()
    padding = (page <= 0)[:, None, None]

    def gather(new: Tensor, stores: list[Tensor]) -> Tensor:
        """`[1, N, Hkv, Hq / Hkv, d]`, one copy for all query heads of a KV head."""
        pairs = new.index_select(0, source)
        if len(at):
            # A page that is nobody's may hold NaN, which must not depend on masks to stay there.
            old = torch.cat([store[page.clamp(min=0), :, exact] for store in stores], 1)
            pairs.index_copy_(0, at, old.masked_fill(padding, 0))
        return pairs[None, :, :, None].expand(1, -1, -1, Hq // Hkv, -1)

    try:
        out, lse = fmha.memory_efficient_attention_partial(
            q.unflatten(1, (Hkv, Hq // Hkv))[None],
            gather(k, [group.views.exact_k for group in layer.groups]),
            gather(v, [group.views.exact_v for group in layer.groups]),
            attn_bias=mask,
        )
    except NotImplementedError as error:
        raise RuntimeError(
            f"LOLA_VLLM_OPS = 'xformers': xformers cannot attend here; install one that was built "
            f"for torch {torch.__version__} and this GPU, or unset the variable:\n{error}"
        ) from error
    return out.reshape(T, Hq, d).contiguous(), lse.reshape(Hq, T)


def prefill(
    layer: LayerState, q: Tensor, k: Tensor, v: Tensor, batch: PrefillBatch, out: Tensor
) -> None:
    """A segment of new tokens per row; see `contract.PrefillOp`. By Triton alone where `unsuited`.

    Raises:
        ValueError: as `backend.prefill`. RuntimeError: as `attend`.
    """
    page = layer.layout.pages[0]  # others differ in their sparse sets alone
    same = q.dtype == k.dtype == v.dtype == page.kv_dtype
    suited = same and unsuited(page, layer.weights.subtract_max) is None
    backend.prefill(layer, q, k, v, batch, out, attend if suited else None)


# Compiles the variants that `prefill` and Triton's decode ask for; see `contract.WarmUp`.
warm_up = functools.partial(warm_up_with, prefill=prefill)


@functools.cache
def unsuited(layout: StateLayout, subtract_max: bool) -> str | None:
    """Why such layers are left to Triton, logged at the first question; None: they are not."""
    d, C = layout.head_dim, layout.update_interval
    seen = layout.window_size + layout.sink_size
    reason = None
    if subtract_max:
        reason = "mixing 'lolcats' needs the largest logit, which xformers does not give"
    elif layout.kv_dtype not in DTYPES:
        reason = f"xformers takes float16 and bfloat16, not {layout.kv_dtype}"
    elif d > MAX_HEAD_DIM or d % HEAD_DIM_MULTIPLE:
        reason = f"head size {d} is not a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
    elif seen > MAX_COPIES * C:
        reason = (
            f"window and sinks of {seen} would be copied at every {C} tokens; the interval must be "
            f"at least a {MAX_COPIES}th of them"
        )
    if reason:
        logger.warning("LoLA prefill is Triton's alone, without xformers: %s", reason)
    return reason


def missing() -> str | None:
    """Why xformers can attend nothing in this environment, from what it says of itself, or None.

    Whether it can on a GPU is found when `warm_up` calls it there.
    """
    ops = (fmha.flash.FwOp, fmha.flash3.FwOp)
    if any(op.SUPPORTS_PARTIAL and op.is_available() for op in ops):
        return None
    return (
        f"xformers has no CUDA kernels here; install a CUDA build of torch (this is "
        f"{torch.__version__}) and an xformers that was built for it"
    )
