"""vLLM's linears and embeddings with weights of fewer bits than a CPU computes with: bfloat16 that
stays so where it runs in float32, and weights of 8 bits, for which vLLM has no CPU kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.kernels.linear import MPLinearKernel, register_linear_kernel
from vllm.model_executor.kernels.linear import MPLinearLayerConfig as KernelConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from lola_vllm.core.ops import cpp, linear


def keep_bfloat16(model: nn.Module) -> None:
    """Have vLLM's own linears, head and embedding hold their weights in bfloat16.

    Call it between loading and vLLM's `process_weights_after_loading`. Left to vLLM are a weight
    that float32 alone can hold, and a CPU of which only the baseline is used: there vLLM's products
    may read prompts faster.
    """
    if not cpp.load() or cpp.cpu_isa() == "baseline":
        return
    for module in cast(Iterable[Any], model.modules()):
        method = getattr(module, "quant_method", None)
        if type(method) is UnquantizedLinearMethod:
            module.quant_method = _Linear()
        elif type(method) is UnquantizedEmbeddingMethod:
            module.quant_method = _Head() if isinstance(module, ParallelLMHead) else _Embedding()


class _Panels:
    """In front of a method of vLLM's: products by `lola::linear` where they can be."""

    def process_weights_after_loading(self, layer: Any) -> None:
        panels = linear.panels_of(layer.weight.data)
        if panels is None:
            super().process_weights_after_loading(layer)  # type: ignore[misc]
            return
        # vLLM hands `cpu_linear` the weight, and reads a layer's size elsewhere.
        layer.weight = nn.Parameter(panels, requires_grad=False)
        layer.cpu_linear = torch.ops.lola.linear


class _Linear(_Panels, UnquantizedLinearMethod):
    pass


class _Head(_Panels, UnquantizedEmbeddingMethod):
    pass


class _Embedding(UnquantizedEmbeddingMethod):
    """An embedding whose rows are widened when they are looked up."""

    def process_weights_after_loading(self, layer: Any) -> None:
        narrow = linear.narrowed(layer.weight.data)
        if narrow is not None:
            layer.weight = nn.Parameter(narrow, requires_grad=False)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return functional.embedding(input_, layer.weight).float()


class CPUInt8LinearKernel(MPLinearKernel):
    """Weights of 8 bits with a scale for each row, and activations as they are: `W8A16` of
    compressed-tensors."""

    @classmethod
    def get_min_capability(cls) -> int:
        """CPUs have none."""
        return -1

    @classmethod
    def can_implement(cls, c: KernelConfig) -> tuple[bool, str | None]:
        """Whether a layer can be taken, and why not."""
        if c.weight_type != scalar_types.uint8b128 or c.group_size != -1 or c.zero_points:
            return False, "CPUInt8 takes symmetric weights of 8 bits with a scale for each row"
        if c.act_type not in (torch.bfloat16, torch.float32):
            return False, f"CPUInt8 computes in bfloat16 or float32, not in {c.act_type}"
        if c.partition_weight_shape[1] % linear.PANEL:
            return False, f"CPUInt8 takes output sizes that are multiples of {linear.PANEL}"
        if not cpp.load():
            return False, "CPUInt8 needs the C++ ops of lola-vllm, which are not built"
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Order `[N, K / 4]` words of four numbers, which have 128 more, for `lola::linear`."""
        self._transform_param(layer, self.w_q_name, _panels_of_words)
        self._transform_param(layer, self.w_s_name, lambda scale: scale.data.flatten().float())
        self._transform_param(layer, "bias", lambda bias: bias.data.float())

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x W^T + bias`, `[.., K]` -> `[.., N]` in the dtype of x."""
        panels, scale, _ = self._get_weight_params(layer)
        return cast(Tensor, torch.ops.lola.linear(x, panels, bias, scale))


def _panels_of_words(words: Tensor) -> Tensor:
    return linear.int8_panels((words.data.contiguous().view(torch.uint8) ^ 128).view(torch.int8))


# Models import this module before they make layers. vLLM has no kernel of its own for them.
register_linear_kernel(CPUInt8LinearKernel, PlatformEnum.CPU)
