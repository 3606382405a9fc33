"""Ops for layers whose KV heads have a page each: one call of a back end's op for each head.

KV heads do not see each other, so a layer is what its heads are. The C++ ops on a CPU take all
heads in one call instead (`native.py`).
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from lola_vllm.ops.contract import (
    DecodeBatch,
    DecodeOp,
    HeadStates,
    LayerDecode,
    LayerPrefill,
    LayerState,
    PrefillBatch,
    PrefillOp,
    State,
)


def decode_by_head(op: DecodeOp) -> LayerDecode:
    """`op` for any layer."""

    @functools.wraps(op)
    def decode(
        state: State, q: Tensor, k: Tensor, v: Tensor, batch: DecodeBatch, out: Tensor
    ) -> None:
        _each(op, state, q, k, v, batch, out)

    return decode


def prefill_by_head(op: PrefillOp) -> LayerPrefill:
    """`op` for any layer."""

    @functools.wraps(op)
    def prefill(
        state: State, q: Tensor, k: Tensor, v: Tensor, batch: PrefillBatch, out: Tensor
    ) -> None:
        _each(op, state, q, k, v, batch, out)

    return prefill


def states_of(state: State) -> tuple[LayerState, ...]:
    """The states of a layer's pages."""
    return state.heads if isinstance(state, HeadStates) else (state,)


def _each(op: Any, state: State, q: Tensor, k: Tensor, v: Tensor, batch: Any, out: Tensor) -> None:
    if not isinstance(state, HeadStates):
        return op(state, q, k, v, batch, out)
    share = q.shape[1] // len(state.heads)
    for i, head in enumerate(state.heads):
        rows = slice(i * share, (i + 1) * share)
        op(head, q[:, rows], k[:, i : i + 1], v[:, i : i + 1], batch, out[:, rows])
