"""LolaLlamaForCausalLM: vLLM's Llama with its attention swapped for LoLA's.

Embedding, MLP, norms, head, tensor and pipeline parallelism, LoRA and quantized linears are
vLLM's own. The class and its flags stay in this file: vLLM caches what it learns of a model by
the hash of the file that is named at registration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFunc,
    get_temporal_copy_spec,
)
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsMambaPrefixCaching,
)
from vllm.model_executor.models.llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from vllm.sequence import IntermediateTensors

from lola_vllm.core.config import LolaLlamaConfig
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.engine.vllm.attention import LolaAttention
from lola_vllm.engine.vllm.cache import row_bytes
from lola_vllm.models.files import CheckpointError
from lola_vllm.models.schema import check_tensors, expected_tensors

logger = init_logger("vllm.lola")


class LolaDecoderLayer(LlamaDecoderLayer):
    """A Llama layer with LoLA attention."""

    def __init__(
        self, vllm_config: VllmConfig, prefix: str = "", config: LolaLlamaConfig | None = None
    ) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=LolaAttention)


class LolaLlamaModel(LlamaModel):
    """A Llama decoder whose layers see RoPE positions below the trained length."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        layer_type: type[nn.Module] = LolaDecoderLayer,
    ) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        self.schedule = ShiftSchedule.of(cast(LolaLlamaConfig, self.config))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
        **extra_layer_kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        """Run `LlamaModel.forward`; compiled with it."""
        if self.schedule is not None:
            positions = self.schedule.rope_position(positions)
        return super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, **extra_layer_kwargs
        )


class LolaLlamaForCausalLM(LlamaForCausalLM, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """A LoLA model. `IsHybrid` although no layer has per-token blocks: vLLM then keeps the state
    right across prefix hits, and would under speculative decoding."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LolaDecoderLayer)
        self.quantized = vllm_config.quant_config is not None

    def _init_model(
        self,
        vllm_config: VllmConfig,
        prefix: str = "",
        layer_type: type[nn.Module] = LolaDecoderLayer,
    ) -> LolaLlamaModel:
        """vLLM's hook for another decoder."""
        return LolaLlamaModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    # vLLM types this by the states of its own models, which all have two or three dimensions; it
    # only takes their product.
    @classmethod
    def get_mamba_state_shape_from_config(  # type: ignore[override]
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, ...], ...]:
        """Shape of a state: one packed row with the pages of all layers."""
        return ((row_bytes(vllm_config),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Bytes."""
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        """How vLLM copies a state at a block boundary: the whole row."""
        return (get_temporal_copy_spec,)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load strictly.

        Raises:
            CheckpointError: tensors missing, unexpected, of the wrong shape, or not finite.
        """
        config = cast(LolaLlamaConfig, self.config)
        expected = expected_tensors(config)
        found: dict[str, tuple[int, ...]] = {}
        packed: set[str] = set()
        loaded = super().load_weights(
            _good_tensors(weights, expected, found, packed if self.quantized else None)
        )
        check_tensors(
            {n: s for n, s in expected.items() if not _is_packed(n, found, packed)}, found
        )
        if self.quantized and (unset := dict(self.named_parameters()).keys() - loaded):
            # Some formats leave parameters at their defaults, so this alone is no fault.
            logger.warning("The quantized checkpoint does not set: %s", ", ".join(sorted(unset)))
        for module in self.modules():
            if isinstance(module, LolaAttention):
                module.weights_changed()
        return loaded


def _is_packed(name: str, found: dict[str, tuple[int, ...]], packed: set[str]) -> bool:
    """Whether a quantized checkpoint has this weight in another form."""
    return name not in found and name.endswith(".weight") and name.rpartition(".")[0] in packed


def _good_tensors(
    weights: Iterable[tuple[str, torch.Tensor]],
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
    packed: set[str] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass on what can be loaded; refuse what is not finite at once.

    Notes in `found` every shape, so that all faults of a checkpoint are reported together. A
    quantized checkpoint has tensors of names and shapes of its own, which vLLM checks: `packed`
    takes the names of their modules.
    """
    for name, tensor in weights:
        values = tensor.float() if tensor.itemsize == 1 else tensor  # float8 cannot be asked
        if tensor.is_floating_point() and not bool(values.isfinite().all()):
            raise CheckpointError(f"{name}: holds values that are not finite (NaN or infinity)")
        if packed is not None and (name not in expected or not tensor.is_floating_point()):
            packed.add(name.rpartition(".")[0])
            yield name, tensor
            continue
        found[name] = tuple(tensor.shape)
        if expected.get(name) == found[name]:
            yield name, tensor
