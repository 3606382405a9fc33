"""vLLM's linears and embeddings with weights that stay bfloat16 where a CPU runs in float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

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
