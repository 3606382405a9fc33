"""Softmax attention of sliding layers: each query sees the newest W pairs, its own included.

Such a layer has a page as others have (`core/state.py`), of a ring of W rows alone. torch's own
attention reads it, on any device.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lola_vllm.core.ops import cpp
from lola_vllm.core.ops.contract import Backend, DecodeBatch, LayerState, PrefillBatch
from lola_vllm.core.state import LayerLayout

BLOCK = 256  # queries at once, at least; a block reads W keys before it


def ops_of(layout: LayerLayout, backend: Backend, device_type: str) -> Backend:
    """The ops of a layer: a back end's, or those below for a sliding layer.

    On CPUs the C++ op of decode serves sliding layers too, and copies no ring.
    """
    if not layout.slides:
        return backend
    serves = device_type == "cpu" and backend.decode is cpp.decode
    return replace(backend, decode=backend.decode if serves else decode, prefill=prefill)


def decode(
    layer: LayerState, q: Tensor, k: Tensor, v: Tensor, batch: DecodeBatch, out: Tensor
) -> None:
    """One new token per row; see `contract.DecodeOp`. Waits for nothing on the device."""
    views, W = layer.groups[0].views, layer.groups[0].layout.ring_size
    live = batch.state_indices > 0
    pages = batch.state_indices.long().clamp(min=0)
    last = batch.seq_lens.long()[:, None] - 1
    rows = torch.arange(W, device=q.device)
    seen = (last - (last - rows) % W >= 0)[:, None, :, None]  # the others hold leftovers
    newest = (rows == last % W)[:, None, :, None]
    keys, values = (
        torch.where(newest, new[:, :, None], exact[pages].masked_fill(~seen, 0))
        for new, exact in ((k, views.exact_k), (v, views.exact_v))
    )
    sinks = layer.weights.sink_logits
    answers = masked_attention(q[:, :, None], keys, values, seen.mT, sinks).squeeze(2)
    out.copy_(answers.masked_fill(~live[:, None, None], 0))
    row = last[:, 0] % W
    for new, exact in ((k, views.exact_k), (v, views.exact_v)):
        exact[pages, :, row] = torch.where(live[:, None, None], new, exact[pages, :, row])


def prefill(
    layer: LayerState, q: Tensor, k: Tensor, v: Tensor, batch: PrefillBatch, out: Tensor
) -> None:
    """A segment of new tokens per row; see `contract.PrefillOp`."""
    views, W = layer.groups[0].views, layer.groups[0].layout.ring_size
    starts, contexts = batch.query_start_loc.tolist(), batch.context_lens.tolist()
    for row, page in enumerate(batch.state_indices.tolist()):
        own = slice(starts[row], starts[row + 1])
        if page <= 0:
            out[own] = 0
            continue
        n, context = own.stop - own.start, contexts[row]
        past = torch.arange(max(0, context - W + 1), context, device=q.device) % W
        keys, values = (
            torch.cat([exact[page, :, past], new[own].transpose(0, 1)], dim=1)[None]
            for new, exact in ((k, views.exact_k), (v, views.exact_v))
        )
        queries = q[own].transpose(0, 1)[None]
        answers = attend(queries, keys, values, W, None, layer.weights.sink_logits)
        out[own] = answers[0].transpose(0, 1)
        kept = torch.arange(max(0, n - W), n, device=q.device)
        to = (context + kept) % W
        for new, exact in ((k, views.exact_k), (v, views.exact_v)):
            exact[page, :, to] = new[own][kept].transpose(0, 1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Answers `[B, Hq, n, d]` to the last n tokens of k and v `[B, Hkv, m, d]`, m >= n.

    Args:
        q: `[B, Hq, n, d]`. window: W, pairs that a query sees, its own included.
        scale: of logits; None: 1 / sqrt(d).
        sink_logits: `[Hq]`, of learned sinks (gpt-oss); None: there are none.
    """
    n, m = q.shape[2], k.shape[2]
    answers = []
    step = max(BLOCK, window) if sink_logits is None else BLOCK  # a bias by head is large
    for first in range(0, n, step):
        stop = min(n, first + step)
        at = torch.arange(first, stop, device=q.device)[:, None] + m - n
        begin = max(0, first + m - n - window + 1)
        held = torch.arange(begin, stop + m - n, device=q.device)
        seen = (held <= at) & (held > at - window)
        keys, values = (x[:, :, begin : stop + m - n] for x in (k, v))
        own = q[:, :, first:stop]
        answers.append(masked_attention(own, keys, values, seen, sink_logits, scale))
    return torch.cat(answers, dim=2)


def causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, sink_logits: Tensor | None
) -> Tensor:
    """Softmax attention over all tokens: `attend` where a window holds all."""
    if sink_logits is not None:
        return attend(q, k, v, k.shape[2], scale, sink_logits)
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    sink_logits: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention `[B, Hq, n, d]` to k and v `[B, Hkv, m, d]` where `seen` `[..., n, m]` is.

    A learned sink is a key and a value of zeros, and a bias of its logit.
    """
    if sink_logits is not None:
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        shape = (*seen.shape[:-3], len(sink_logits), q.shape[2], 1)
        of_sinks = sink_logits.to(q.dtype)[:, None, None].expand(shape)
        bias = torch.where(seen, 0, -torch.inf).to(q.dtype).expand(*shape[:-1], -1)
        seen = torch.cat([bias, of_sinks], dim=-1)
    return scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
