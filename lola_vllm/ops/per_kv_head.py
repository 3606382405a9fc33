"""Ops for layers whose KV heads have a page each: one call of a back end's op for each head.

KV heads do not see each other, so a layer is what its heads are. The C++ ops on a CPU take all
heads in one call instead (`cpp.py`).
"""

from __future__ import annotations

import functools
from typing import TypeVar

from torch import Tensor

from lola_vllm.ops.contract import HeadStates, LayerState, Op, State

B = TypeVar("B")


def per_kv_head(op: Op[LayerState, B]) -> Op[State, B]:
    """An op of layers with one page for any layer."""

    @functools.wraps(op)
    def each(state: State, q: Tensor, k: Tensor, v: Tensor, batch: B, out: Tensor) -> None:
        if not isinstance(state, HeadStates):
            return op(state, q, k, v, batch, out)
        share = q.shape[1] // len(state.heads)
        for i, head in enumerate(state.heads):
            rows = slice(i * share, (i + 1) * share)
            op(head, q[:, rows], k[:, i : i + 1], v[:, i : i + 1], batch, out[:, rows])

    return each


def states_of(state: State) -> tuple[LayerState, ...]:
    """The states of a layer's pages."""
    return state.heads if isinstance(state, HeadStates) else (state,)
