"""What vLLM's model classes have in common as LoLA models: the state, and strict loading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
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
from vllm.platforms import current_platform

from lola_vllm.engine.vllm.attention import LolaAttention
from lola_vllm.engine.vllm.cache import lola_hf_config, row_bytes
from lola_vllm.engine.vllm.cpu_linear import keep_bfloat16
from lola_vllm.models.files import CheckpointError
from lola_vllm.models.schema import check_tensors, expected_tensors, is_ours

logger = init_logger("vllm.lola")

Named = tuple[str, torch.Tensor]


class HasLolaState(HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """The state of a LoLA model in vLLM's terms. `IsHybrid` although no layer has per-token blocks:
    vLLM then keeps the state right across prefix hits."""

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


def load_strictly(
    model: Any,
    load: Callable[[Iterable[Named]], set[str]],
    weights: Iterable[Named],
    vllm_config: VllmConfig,
) -> set[str]:
    """Load a checkpoint. The base's own tensors are checked here where the base is a Llama
    (`DecoderConfig.is_llama`), else by vLLM's loader.

    Args:
        load: vLLM's own `load_weights` of the model.

    Raises:
        CheckpointError: tensors missing, unexpected, of the wrong shape, or not finite.
    """
    expected = expected_tensors(lola_hf_config(vllm_config))
    quantized = vllm_config.quant_config is not None
    found: dict[str, tuple[int, ...]] = {}
    packed: set[str] = set()
    loaded = load(_good_tensors(weights, expected, found, packed if quantized else None))
    check_tensors({n: s for n, s in expected.items() if not _is_packed(n, found, packed)}, found)
    if quantized and (unset := dict(model.named_parameters()).keys() - loaded):
        # Some formats leave parameters at their defaults, so this alone is no fault.
        logger.warning("The quantized checkpoint does not set: %s", ", ".join(sorted(unset)))
    if current_platform.is_cpu() and vllm_config.model_config.dtype == torch.float32:
        keep_bfloat16(model)
    for module in model.modules():
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
    only_ours = all(map(is_ours, expected))
    for name, tensor in weights:
        values = tensor.float() if tensor.itemsize == 1 else tensor  # float8 cannot be asked
        if tensor.is_floating_point() and not bool(values.isfinite().all()):
            raise CheckpointError(f"{name}: holds values that are not finite (NaN or infinity)")
        if only_ours and not is_ours(name):
            yield name, tensor
            continue
        if packed is not None and (name not in expected or not tensor.is_floating_point()):
            packed.add(name.rpartition(".")[0])
            yield name, tensor
            continue
        found[name] = tuple(tensor.shape)
        if expected.get(name) == found[name]:
            yield name, tensor
