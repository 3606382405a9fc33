"""An op of a layer from an op of a head group: one call for each group.

The C++ and CUDA ops take all groups of a layer in one call instead (`cpp.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from torch import Tensor

from lola_vllm.core.ops.contract import HeadGroup, LayerState

B = TypeVar("B")  # the rows

GroupOp: TypeAlias = Callable[[HeadGroup, Tensor, Tensor, Tensor, B, Tensor], None]
LayerOp: TypeAlias = Callable[[LayerState, Tensor, Tensor, Tensor, B, Tensor], None]


def per_group(op: GroupOp[B]) -> LayerOp[B]:
    """The op of a layer that calls `op` for each of its groups, with their heads of the tokens."""

    @functools.wraps(op)
    def each(layer: LayerState, q: Tensor, k: Tensor, v: Tensor, batch: B, out: Tensor, /) -> None:
        if len(layer.groups) == 1:  # nothing to slice
            return op(layer.groups[0], q, k, v, batch, out)
        queries, pairs = (x.shape[1] // len(layer.groups) for x in (q, k))
        for i, group in enumerate(layer.groups):
            own = slice(i * queries, (i + 1) * queries)
            kv = slice(i * pairs, (i + 1) * pairs)
            op(group, q[:, own], k[:, kv], v[:, kv], batch, out[:, own])

    return each
