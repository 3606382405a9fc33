"""vLLM's C++ norms on a CPU: what they give, and whose choice it is."""

import pytest
import torch
from vllm.config.kernel import IrOpPriorityConfig
from vllm.ir.op import IrOp

from lola_vllm.engine.vllm.cpu_norms import NORMS, prefer_cpp_norms


def test_norms_are_done_by_the_cpp_op_unless_the_user_chose():
    priorities = IrOpPriorityConfig.with_default(["native"], rms_norm=["native", NORMS])
    prefer_cpp_norms(priorities)
    assert priorities.rms_norm == ["native", NORMS]
    assert priorities.fused_add_rms_norm == [NORMS, "native"]
    priorities.set_default()  # raises where an implementation is not supported


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [96, 100])
def test_they_give_what_plain_torch_does(dtype, size):
    prefer_cpp_norms(IrOpPriorityConfig.with_default(["native"]))
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, size), torch.randn(5, size), torch.randn(size)
    x, residual, weight = (y.to(dtype) for y in (x, residual, weight))
    close = {"atol": 0.05, "rtol": 0.02} if dtype == torch.bfloat16 else {}
    for name, args in (("rms_norm", (x,)), ("fused_add_rms_norm", (x, residual))):
        op = IrOp.registry[name]
        assert op.impls[NORMS].supports_args(*args, weight, 1e-5) == (size == 96)
        wanted = op.impls["native"].impl_fn(*args, weight, 1e-5)
        with op.set_priority([NORMS, "native"]):
            found = op(*(y.clone() for y in args), weight, 1e-5)
        torch.testing.assert_close(found, wanted, **close)
