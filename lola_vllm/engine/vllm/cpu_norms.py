"""RMSNorm on CPUs by vLLM's own C++ ops, which vLLM takes on GPUs alone.

In plain torch a norm is six operators: 26 us instead of 6 for a row of 576 numbers (AVX2). A step
has two norms in each layer. Where a model is compiled, the compiler fuses them, so these are for
models that are not. `lola_vllm/engine/vllm/cpu_worker.py` says when.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config.kernel import IrOpPriorityConfig
from vllm.ir.op import IrOp
from vllm.platforms import current_platform

NORMS = "lola_cpp"  # what vLLM calls an implementation by
WIDEST_VECTOR = 32  # numbers of bfloat16 in a register: the ops take whole ones


def prefer_cpp_norms(priorities: IrOpPriorityConfig) -> None:
    """Have norms done by the C++ ops, unless the user chose another implementation."""
    current_platform.import_ir_kernels()
    for name, impl, suits, inplace in (
        ("rms_norm", _norm, _suits_norm, False),
        ("fused_add_rms_norm", _sum_and_norm, _suits_sum, True),
    ):
        if not hasattr(torch.ops._C, name):
            continue
        op = IrOp.registry[name]
        if NORMS not in op.impls:
            op.register_impl(NORMS, supports_args=suits, inplace=inplace)(impl)
        if getattr(priorities, name) == ["native"]:
            setattr(priorities, name, [NORMS, "native"])


# vLLM asks for its own names of parameters.
def _norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def _sum_and_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _suits_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return variance_size is None and weight is not None and _suits(x, weight)


def _suits_sum(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return variance_size is None and weight is not None and _suits(x, x_residual, weight)


def _suits(x: Tensor, *others: Tensor) -> bool:
    whole = x.shape[-1] % WIDEST_VECTOR == 0
    return whole and all(t.dtype == x.dtype and t.is_contiguous() for t in (x, *others))
