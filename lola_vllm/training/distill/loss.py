"""The loss of stage 2, with the gradient of the hidden states made beside it.

A vocabulary has more numbers than a layer: logits of a row would be the largest activation of
training. So they exist for a block of tokens at a time, and once: what autograd would compute again
for the gradient is at hand when the loss is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LOSS_BLOCK = 256  # tokens whose logits exist at once


def token_loss(head: nn.Linear, hidden: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over tokens of KL(teacher || student).

    Args:
        head: the LM head, which is not trained. Products are made in its dtype.
        hidden: `[n, hidden_size]`, the student's. teacher: likewise. weights: `[n]` float32.

    Returns:
        Float32 scalar (float64 for a float64 head), with a gradient to `hidden` alone.
    """
    total: Tensor = _TokenLoss.apply(hidden, head.weight, head.bias, teacher, weights)
    return total


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        teacher: Tensor,
        weights: Tensor,
    ) -> Tensor:
        gradient = torch.empty_like(hidden)
        wide = torch.promote_types(matrix.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):

            def log_probabilities(x: Tensor) -> Tensor:
                return (
                    nn.functional.linear(x.to(matrix.dtype), matrix, bias).to(wide).log_softmax(-1)
                )

            for first in range(0, len(hidden), LOSS_BLOCK):
                at = slice(first, first + LOSS_BLOCK)
                said, weight = log_probabilities(hidden[at]), weights[at].to(wide)
                wanted = log_probabilities(teacher[at])
                p = wanted.exp()
                total += wanted.sub_(said).mul_(p).sum(-1) @ weight
                of_logits = said.exp_().sub_(p)
                of_logits.mul_(weight[:, None])
                gradient[at] = of_logits.to(matrix.dtype) @ matrix
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *of_total: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_total[0].to(gradient.dtype), None, None, None, None
