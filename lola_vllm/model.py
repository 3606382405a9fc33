"""LolaLlamaForCausalLM: vLLM's Llama with its attention swapped for LoLA's.

Embedding, MLP, norms, head, tensor and pipeline parallelism, LoRA and quantized linears are
vLLM's own. The class and its flags stay in this file: vLLM caches what it learns of a model by
the hash of the file that is named at registration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFunc,
    get_temporal_copy_spec,
)
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsMambaPrefixCaching,
)
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from lola_vllm.attention import LolaAttention
from lola_vllm.cache import state_layout
from lola_vllm.checkpoint.files import CheckpointError
from lola_vllm.checkpoint.schema import LOLA_TENSORS, check_tensors, expected_tensors
from lola_vllm.config import LolaLlamaConfig


class LolaDecoderLayer(LlamaDecoderLayer):
    """A Llama layer with LoLA attention."""

    def __init__(
        self, vllm_config: VllmConfig, prefix: str = "", config: LolaLlamaConfig | None = None
    ) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=LolaAttention)


class LolaLlamaForCausalLM(LlamaForCausalLM, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """A LoLA model. `IsHybrid` although no layer has per-token blocks: vLLM then keeps the state
    right across prefix hits, and would under speculative decoding."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LolaDecoderLayer)
        self.quantized = vllm_config.quant_config is not None

    # vLLM types this by the states of its own models, which all have two or three dimensions; it
    # only takes their product.
    @classmethod
    def get_mamba_state_shape_from_config(  # type: ignore[override]
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, ...], ...]:
        """Shape of a layer's state: one packed page."""
        return ((state_layout(vllm_config).page_bytes,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Bytes."""
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        """How vLLM copies a state at a block boundary: the whole page."""
        return (get_temporal_copy_spec,)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load strictly.

        Raises:
            CheckpointError: tensors missing, unexpected, of the wrong shape, or not finite.
        """
        config = cast(LolaLlamaConfig, self.config)
        num_state_heads = config.lola.num_state_heads or config.num_attention_heads
        expected = expected_tensors(config, num_state_heads)
        found: dict[str, tuple[int, ...]] = {}
        if self.quantized:  # packed weights and scales have names and shapes of their own
            expected = {name: shape for name, shape in expected.items() if _is_lola(name)}
        loaded = super().load_weights(_good_tensors(weights, expected, found, self.quantized))
        if self.quantized:
            found = {name: shape for name, shape in found.items() if _is_lola(name)}
        check_tensors(expected, found)
        for module in self.modules():
            if isinstance(module, LolaAttention):
                module.prepare_weights()
        return loaded


def _is_lola(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in LOLA_TENSORS


def _good_tensors(
    weights: Iterable[tuple[str, torch.Tensor]],
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
    quantized: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass on what can be loaded and note every shape in `found`, so that all faults of a
    checkpoint are reported together; refuse what is not finite at once."""
    for name, tensor in weights:
        found[name] = tuple(tensor.shape)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name}: holds values that are not finite (NaN or infinity)")
        if expected.get(name) == found[name] or (quantized and not _is_lola(name)):
            yield name, tensor
