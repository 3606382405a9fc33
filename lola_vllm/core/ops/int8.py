"""Rows of int8 numbers with a float32 scale each: how `sparse_dtype = "int8"` keeps pairs.

A row x is stored as integers and a scale, and stands for integers times scale from then on
(`docs/algorithm.md`, section 6). The kernels do the same in float32, operation by operation, so
every back end stores the same integers and the same scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.core.ops.constants import PAIR_MAX


class Int8Rows(NamedTuple):
    """Rounded rows.

    Attributes:
        numbers: `[..., d]` int8, from -127 to 127. scale: `[...]` float32; NaN for a row with an
            entry that is not finite.
    """

    numbers: Tensor
    scale: Tensor

    def to(self, dtype: torch.dtype) -> Tensor:
        """What the rows stand for, `[..., d]` in a floating-point dtype of 32 bits or more."""
        return self.numbers.to(dtype) * self.scale.to(dtype).unsqueeze(-1)


def quantize(x: Tensor) -> Int8Rows:
    """Round rows to int8 with a scale each.

    scale = max |x_i| / 127, and each number is x_i / scale rounded to the nearest, ties to even,
    all in float32. A row of zeros has the scale 0. A row with an infinite entry or a NaN has the
    scale NaN, so all of it becomes NaN, as has a score that is made of it.

    Args:
        x: `[..., d]`, any floating-point dtype.
    """
    x = x.float()
    largest = x.abs().amax(-1)
    # By a product: some devices divide by a constant as a product and others do not.
    scale = torch.where(largest < torch.inf, largest * (1 / PAIR_MAX), torch.nan)
    steps = (x / scale.unsqueeze(-1)).round().clamp(-PAIR_MAX, PAIR_MAX)
    return Int8Rows(torch.where(scale.unsqueeze(-1) > 0, steps, 0).to(torch.int8), scale)


def rounded(x: Tensor) -> Tensor:
    """What the rows of x `[..., d]`, float32 or float64, stand for once they are stored.

    A gradient passes as if nothing was rounded.
    """
    return _Round.apply(x)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return quantize(x).to(x.dtype)

    @staticmethod
    def backward(_ctx: object, grad: Tensor) -> Tensor:
        return grad
