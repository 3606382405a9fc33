"""Rows of int8 numbers with a scale each."""

import pytest
import torch

from lola_vllm.core.ops.int8 import Int8Rows, quantize, rounded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_number_is_the_nearest(dtype):
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = quantize(x)
    assert (rows.numbers.dtype, rows.scale.dtype) == (torch.int8, torch.float32)
    assert (rows.numbers.abs().amax(-1) == 127).all()
    away = (rows.to(torch.float64) - x.double()).abs() / rows.scale.double()[:, None]
    assert away.max() < 0.5 + 1e-4
    torch.testing.assert_close(rows.scale.double(), x.double().abs().amax(-1) / 127)


def test_ties_go_to_the_even_number():
    rows = quantize(torch.tensor([[254.0, 1.0, 3.0, 5.0, -1.0, -3.0]]))
    assert rows.numbers.tolist() == [[127, 0, 2, 2, 0, -2]] and rows.scale.tolist() == [2.0]


def test_rows_of_zeros_and_of_the_least_numbers():
    rows = quantize(torch.tensor([[0.0, -0.0], [1e-45, -1e-44], [1.0, 2e-45]]))
    assert rows.to(torch.float32)[:2].abs().max() < 3e-44
    assert rows.numbers.tolist()[0] == [0, 0] and rows.numbers.tolist()[2] == [127, 0]
    assert rows.scale.tolist()[0] == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_makes_its_row_nan_and_no_other(bad):
    x = torch.ones(3, 4)
    x[1, 2] = bad
    rows = quantize(x)
    assert rows.to(torch.float32).isnan().tolist() == [[False] * 4, [True] * 4, [False] * 4]
    assert rows.numbers[1].tolist() == [0] * 4  # no conversion of a NaN, which machines do apart


def test_what_is_stored_stands_for_the_same_in_every_dtype():
    rows = Int8Rows(torch.tensor([[3, -127]], dtype=torch.int8), torch.tensor([0.1]))
    exact = torch.tensor([[3.0, -127.0]], dtype=torch.float64) * torch.tensor(0.1).double()
    assert torch.equal(rows.to(torch.float64), exact)
    assert torch.equal(rows.to(torch.float32), exact.float())


def test_gradients_pass():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = rounded(x)
    assert y.dtype == x.dtype and not torch.equal(y, x)
    assert torch.equal(y, quantize(x).to(torch.float64))
    (gradient,) = torch.autograd.grad((y * torch.arange(5)).sum(), x)
    assert torch.equal(gradient, torch.arange(5).double().expand(3, 5))
