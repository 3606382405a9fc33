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


def _to_panels(layer: Any) -> bool:
    weight = layer.weight.data
    panels = None if weight.is_meta else linear.panels_of(weight)
    if panels is None:
        return False
    # vLLM hands `cpu_linear` the weight, and reads a layer's size elsewhere.
    layer.weight = nn.Parameter(panels, requires_grad=False)
    layer.cpu_linear = torch.ops.lola.linear
    return True


class _Linear(UnquantizedLinearMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        if not _to_panels(layer):
            super().process_weights_after_loading(layer)


class _Head(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        if not _to_panels(layer):
            super().process_weights_after_loading(layer)


class _Embedding(UnquantizedEmbeddingMethod):
    """An embedding whose rows are widened when they are looked up."""

    def process_weights_after_loading(self, layer: Any) -> None:
        weight = layer.weight.data
        if weight.is_meta:  # a pooling model's second one, which nothing reads
            return
        narrow = weight.bfloat16()
        if torch.equal(narrow.to(weight.dtype), weight):
            layer.weight = nn.Parameter(narrow, requires_grad=False)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return functional.embedding(input_, layer.weight).float()
