"""Products with weights of bfloat16 and of int8."""

import pytest
import torch
from torch.nn.functional import linear

from lola_vllm.core.ops.linear import int8_panels, panels_of
from tests.support.backends import only


@only("cpp")
@pytest.mark.parametrize("inner, outer", [(1, 32), (37, 96), (640, 64)])
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 9, 75, 150])
def test_products(backend, inner, outer, rows):
    torch.manual_seed(rows)
    weight, bias = torch.randn(outer, inner).bfloat16(), torch.randn(outer)
    x = torch.randn(rows, 2 * inner)[:, ::2]
    panels = panels_of(weight.float())
    found = torch.ops.lola.linear(x, panels, bias)
    wanted = linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    for row in {0, rows // 2, rows - 1} if rows else ():  # alone, in another shape, without bias
        alone = torch.ops.lola.linear(x[row][None, None], panels, None)
        assert torch.equal(alone[0, 0] + bias, found[row])


@only("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner, outer", [(4, 32), (37, 96), (640, 64), (268, 32)])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 8, 9, 13, 75, 150])
def test_products_with_int8(backend, dtype, inner, outer, rows):
    torch.manual_seed(rows)
    numbers = torch.randint(-128, 128, (outer, inner), dtype=torch.int8)
    scale, bias = torch.rand(outer) / 100, torch.randn(outer)
    x = torch.randn(rows, 2 * inner).to(dtype)[:, ::2]
    panels = int8_panels(numbers)
    found = torch.ops.lola.linear(x, panels, bias, scale)
    wanted = linear(x.double(), numbers.double() * scale.double()[:, None], bias.double())
    assert found.dtype == dtype
    step = 2**-8 if dtype == torch.bfloat16 else 1e-5  # a half of a unit in the last place
    torch.testing.assert_close(found.double(), wanted, rtol=1.01 * step, atol=1e-4)
    for row in {0, rows // 2, rows - 1} if rows else ():  # alone, in another shape
        alone = torch.ops.lola.linear(x[row][None, None], panels, bias, scale)
        assert torch.equal(alone[0, 0], found[row])


@only("cpp")
def test_weights_that_bfloat16_cannot_hold_are_left(backend):
    weight = torch.ones(64, 5)
    assert panels_of(weight[:48]) is None  # no whole panels
    assert panels_of(weight.bfloat16()).shape == (2, 5, 32)
    weight[63, 4] += 2**-9
    assert panels_of(weight) is None


@only("cpp")
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, panels, bias: (x.double(), panels, bias), "x: dtype Double"),
        (lambda x, panels, bias: (x[:, 1:], panels, bias), r"panels: .*\[N / 32, K, 32\]"),
        (lambda x, panels, bias: (x, panels.float(), bias), "panels: dtype Float"),
        (lambda x, panels, bias: (x, panels, bias[1:]), r"bias: .*\[N\]"),
        (lambda x, panels, bias: (x, panels, bias, bias), "panels: dtype BFloat16, .* int8"),
        (lambda x, panels, bias: (x, panels.char(), bias, bias[1:]), r"scale: .*\[N\]"),
        (lambda x, panels, bias: (x.half(), panels.char(), bias, bias), "x: dtype Half"),
    ],
)
def test_an_argument(backend, change, message):
    arguments = torch.ones(2, 5), panels_of(torch.ones(64, 5)), torch.ones(64)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lola.linear(*change(*arguments))
