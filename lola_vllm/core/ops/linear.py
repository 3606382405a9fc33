"""Products with weights of fewer bits than all else, on CPUs.

Weights of 8 bits are whole numbers with a scale for each row. A product of few rows takes the time
of reading its weights, so it takes half of that of bfloat16.

On a CPU without products of bfloat16 a model runs in float32. Weights that were trained and stored
in bfloat16 lose nothing if they stay so in memory: each is widened where it is multiplied. They
take half the room, and a product of few rows, which takes the time of reading them, half the time.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lola_vllm.core.ops import cpp

PANEL = 32  # columns of the result; `kPanel` in csrc/cpu/kernels.h
_LANES = {"baseline": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}


def narrowed(weight: Tensor) -> Tensor | None:
    """A weight in bfloat16, None where a number is none or the weight lies on no device."""
    if weight.is_meta:
        return None
    narrow = weight.bfloat16()
    return narrow if torch.equal(narrow.to(weight.dtype), weight) else None


def panels_of(weight: Tensor) -> Tensor | None:
    """A weight as `torch.ops.lola.linear(x, panels, bias)` takes it.

    Args:
        weight: `[N, K]`, float32 or bfloat16.

    Returns:
        `[N / 32, K, 32]` bfloat16, in an order of columns that suits this CPU. None where the C++
        kernels are not there, 32 does not divide N, or it is not `narrowed`.
    """
    if weight.dim() != 2 or weight.shape[0] % PANEL or not weight.numel() or not cpp.load():
        return None
    narrow = narrowed(weight)
    if narrow is None:
        return None
    lanes = _LANES[cpp.cpu_isa()]
    return _panels(narrow, torch.arange(PANEL).view(-1, 2, lanes).mT.flatten())


def int8_panels(numbers: Tensor) -> Tensor:
    """A weight as `torch.ops.lola.linear(x, panels, bias, scale)` takes it.

    Args:
        numbers: `[N, K]` int8, where 32 divides N. Row n of the weight is `scale[n]` times them.

    Returns:
        `[N / 32, K, 32]` int8.
    """
    return _panels(numbers, torch.arange(PANEL))


def _panels(weight: Tensor, order: Tensor) -> Tensor:
    _register_fake()
    return weight.view(-1, PANEL, weight.shape[1])[:, order].mT.contiguous()


@functools.cache
def _register_fake() -> None:
    @torch.library.register_fake("lola::linear")
    def fake(x: Tensor, panels: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
        return x.new_empty(*x.shape[:-1], panels.shape[0] * PANEL)
