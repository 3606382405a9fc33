"""The loss of stage 2 and the gradient beside it, against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lola_vllm.training.distill import loss


def drawn(dtype: torch.dtype, bias: bool) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(13, 101, bias=bias).to(dtype).requires_grad_(False)
    hidden, teacher = torch.randn(2, 11, 13, dtype=dtype)
    return head, hidden.requires_grad_(), teacher, torch.rand(11) + 0.5


def by_autograd(head, hidden, teacher, weights):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    said = head(hidden).to(wide).log_softmax(-1)
    wanted = head(teacher).to(wide).log_softmax(-1)
    each = nn.functional.kl_div(said, wanted, log_target=True, reduction="none").sum(-1)
    return (each * weights).sum()


@pytest.mark.parametrize("block", [1, 4, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradient_are_autograds(monkeypatch, bias, block):
    monkeypatch.setattr(loss, "LOSS_BLOCK", block)
    args = drawn(torch.float64, bias)
    hidden = args[1]
    expected = by_autograd(*args)
    (wanted,) = torch.autograd.grad(3 * expected, hidden)
    found = loss.token_loss(*args)
    (gradient,) = torch.autograd.grad(3 * found, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_a_teacher_that_says_the_same_costs_nothing():
    head, hidden, _, weights = drawn(torch.float32, False)
    found = loss.token_loss(head, hidden, hidden.detach(), weights)
    (gradient,) = torch.autograd.grad(found, hidden)
    assert found == 0 and gradient.abs().max() == 0


def test_sums_are_float32_in_bfloat16_and_under_autocast():
    head, hidden, teacher, weights = drawn(torch.bfloat16, False)
    expected = by_autograd(head, hidden, teacher, weights)
    (wanted,) = torch.autograd.grad(expected, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss.token_loss(head, hidden.float(), teacher.float(), weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, hidden)
    torch.testing.assert_close(gradient, wanted, rtol=2e-2, atol=1e-3)
