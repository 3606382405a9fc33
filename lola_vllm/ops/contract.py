"""What every back end's ops take: the layer's weights, and the shapes of a call.

A back end provides two functions that work in place on the pages of `StateViews`:

    decode(q, k, v, weights, layout, views, slots, seq_lens, out)
    prefill(q, k, v, weights, layout, views, slots, query_start_loc, context_lens, out)

Both see each new token, write its pair, answer its query and, at an update point, evict, rescore,
select and fold. Slot 0 is vLLM's null block: a row with slot <= 0 is padding, reads and writes no
page, and its output is zero. Nothing of a page is read that its token count does not vouch for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lola_vllm.state import StateLayout, StateViews


@dataclass(frozen=True)
class LolaWeights:
    """A layer's LoLA weights on one rank.

    Attributes:
        feature_map_q: `[Hq, d, F]`. feature_map_k: `[Hs, d, F]`.
        log_gate: `[Hq]`, log g - log(weight of the linear part): logit(g) for mixing "lola",
            log g for "lolcats" (section 4 of `docs/algorithm.md`).
        subtract_max: the "lolcats" mixing weighs exact pairs relative to their largest logit.
    """

    feature_map_q: Tensor
    feature_map_k: Tensor
    log_gate: Tensor
    subtract_max: bool

    @classmethod
    def prepare(
        cls, feature_map_q: Tensor, feature_map_k: Tensor, window_factors: Tensor, mixing: str
    ) -> LolaWeights:
        """From checkpoint tensors; `window_factors [Hq]` are logits of the gate g.

        The maps are kept in float32 (float64 where they are that), in which they are applied.
        """
        wide = torch.promote_types(feature_map_q.dtype, torch.float32)
        factors = window_factors.to(torch.promote_types(window_factors.dtype, torch.float32))
        lolcats = mixing == "lolcats"
        log_gate = torch.nn.functional.logsigmoid(factors) if lolcats else factors
        return cls(feature_map_q.to(wide), feature_map_k.to(wide), log_gate, lolcats)


class DecodeOp(Protocol):
    """One new token per row."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: LolaWeights,
        layout: StateLayout,
        views: StateViews,
        slots: Tensor,
        seq_lens: Tensor,
        out: Tensor,
    ) -> None:
        """q `[B, Hq, d]`, k and v `[B, Hkv, d]`, slots and seq_lens `[B]`, out `[B, Hq, d]`.

        `seq_lens` count the new token, which so has position `seq_lens - 1`.
        """


class PrefillOp(Protocol):
    """A run of new tokens per row, from an empty or a live page."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: LolaWeights,
        layout: StateLayout,
        views: StateViews,
        slots: Tensor,
        query_start_loc: Tensor,
        context_lens: Tensor,
        out: Tensor,
    ) -> None:
        """q `[T, Hq, d]`, k and v `[T, Hkv, d]`, slots `[R]`, out `[T, Hq, d]`.

        `query_start_loc [R + 1]` and `context_lens [R]` (tokens already in each page) are integer
        tensors in host memory: back ends plan from them without waiting for the device.
        """


class WarmUp(Protocol):
    """Compiles what a layer's steps can ask for, before the first of them."""

    def __call__(
        self, weights: LolaWeights, layout: StateLayout, views: StateViews, num_heads: int
    ) -> None:
        """Touches no page; `num_heads` is Hq."""


@dataclass(frozen=True)
class Backend:
    """The ops chosen for a device.

    Attributes:
        capturable: `decode` launches the same kernels whatever the token counts and waits for
            nothing, so that a CUDA graph can hold it.
    """

    name: str
    decode: DecodeOp
    prefill: PrefillOp
    warm_up: WarmUp | None = None
    capturable: bool = False
