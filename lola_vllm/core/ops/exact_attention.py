"""Softmax attention of chunks to the pairs that are listed for each, with gradients.

A part of `differentiable.py`. Logits exist for some chunks at a time, and are computed again for
the gradient: kept for all chunks they would be most of what training keeps (as in FlashAttention,
arXiv 2205.14135, section 3.1).

Symbols: B rows; Hkv KV heads; Hg sparse sets; N chunks; C queries of a chunk; R = C times the query
heads of a set, head by head; S listed pairs; P pairs there are; d `head_dim`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_LOGITS = 2**20  # at a time, about: they stay in the cache of a processor


class ExactAttention(NamedTuple):
    """Answers of chunks, in the dtype of the queries.

    Attributes:
        y: `[B, Hg, N, R, d]`. lse, largest: `[B, Hg, N, R]`, of the logits.
    """

    y: Tensor
    lse: Tensor
    largest: Tensor


def exact_attention(
    queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, index: Tensor, rows: Tensor
) -> ExactAttention:
    """Attend to listed pairs, with gradients to queries, keys and values.

    Args:
        queries: `[B, Hg, N, R, d]` at `positions` `[N, C]`. keys, values: `[B, Hkv, P, d]`, where
            Hkv divides Hg.
        index: `[B, Hg, N, S]` int64, positions of pairs, -1 where there is none. A query sees those
            up to its own position, and at least one. rows: the same shape, where they are among
            the P.
    """
    found = _ExactAttention.apply(queries, keys, values, positions, index, rows)
    return ExactAttention(*found)


class _Blocks(NamedTuple):
    """What forward and backward compute alike, some chunks at a time."""

    queries: Tensor
    keys: Tensor  # [B Hkv P, d]
    values: Tensor
    positions: Tensor
    listed: Tensor
    flat: Tensor  # [B, Hg, N, S], rows of keys

    @classmethod
    def of(
        cls, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, index: Tensor,
        rows: Tensor,
    ) -> _Blocks:  # fmt: skip
        B, Hkv, P, d = keys.shape
        share = index.shape[1] // Hkv
        heads = torch.arange(B * Hkv, device=keys.device).view(B, Hkv).repeat_interleave(share, 1)
        flat = rows + P * heads[:, :, None, None]
        return cls(
            queries, keys.reshape(-1, d), values.reshape(-1, d), positions, index, flat
        )  # fmt: skip

    def slices(self) -> list[slice]:
        B, Hg, N, R, _ = self.queries.shape
        size = max(1, BLOCK_LOGITS // max(1, B * Hg * R * self.listed.shape[-1]))
        return [slice(first, min(first + size, N)) for first in range(0, N, size)]

    def gather(self, pairs: Tensor, at: slice) -> Tensor:
        """Listed keys or values `[B, Hg, n, S, d]`."""
        flat = self.flat[:, :, at]
        return pairs.index_select(0, flat.reshape(-1)).view(*flat.shape, -1)

    def logits(self, k: Tensor, at: slice) -> Tensor:
        """`[B, Hg, n, R, S]`, minus infinity where a query does not see a pair."""
        d, C = k.shape[-1], self.positions.shape[1]
        logits = (self.queries[:, :, at] * d**-0.5) @ k.mT
        index = self.listed[:, :, at, None]
        unseen = (index < 0) | (index > self.positions[at, :, None])  # [B, Hg, n, C, S]
        by_head = logits.view(*logits.shape[:3], -1, C, logits.shape[-1])
        by_head.masked_fill_(unseen.unsqueeze(3), -torch.inf)
        return logits


class _ExactAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        blocks = _Blocks.of(*args)
        y = torch.empty_like(blocks.queries)
        lse, largest = (y.new_empty(y.shape[:-1]) for _ in range(2))
        for at in blocks.slices():
            logits = blocks.logits(blocks.gather(blocks.keys, at), at)
            largest[:, :, at] = top = logits.amax(-1)
            p = logits.sub_(top.unsqueeze(-1)).exp_()
            total = p.sum(-1)
            lse[:, :, at] = top + total.log()
            y[:, :, at] = (p @ blocks.gather(blocks.values, at)) / total.unsqueeze(-1)
        ctx.save_for_backward(*args, y, lse, largest)
        ctx.set_materialize_grads(False)
        return y, lse, largest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *args, y, lse, largest = ctx.saved_tensors
        of_y, of_lse, of_largest = gradients
        blocks = _Blocks.of(*args)
        if of_y is None:
            of_y = torch.zeros_like(y)
        of_queries = torch.empty_like(y)
        of_keys, of_values = torch.zeros_like(blocks.keys), torch.zeros_like(blocks.values)
        inner = -(of_y * y).sum(-1)
        if of_lse is not None:
            inner += of_lse
        for at in blocks.slices():
            k, v = (blocks.gather(pairs, at) for pairs in (blocks.keys, blocks.values))
            logits = blocks.logits(k, at)
            first = None
            if of_largest is not None:  # equal ones share it, as in `amax`
                first = (logits == largest[:, :, at, :, None]).to(y.dtype)
                first *= (of_largest[:, :, at] / first.sum(-1)).unsqueeze(-1)
            p = logits.sub_(lse[:, :, at, :, None]).exp_()
            flat, back = blocks.flat[:, :, at].reshape(-1), of_y[:, :, at]
            of_values.index_add_(0, flat, (p.mT @ back).reshape(len(flat), -1))
            of_logits = (back @ v.mT).add_(inner[:, :, at, :, None]).mul_(p)
            if first is not None:
                of_logits += first
            of_logits *= k.shape[-1] ** -0.5
            of_queries[:, :, at] = of_logits @ k
            each = of_logits.mT @ blocks.queries[:, :, at]
            of_keys.index_add_(0, flat, each.reshape(len(flat), -1))
        shape = args[1].shape
        return of_queries, of_keys.view(shape), of_values.view(shape), None, None, None
