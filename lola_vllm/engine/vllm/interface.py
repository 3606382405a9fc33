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
    """Load a checkpoint. LoLA's tensors are checked here, and the base's by vLLM's loader.

    Args:
        load: vLLM's own `load_weights` of the model.

    Raises:
        CheckpointError: a tensor that vLLM cannot take or that is not finite, or LoLA's tensors
            missing, unexpected or of the wrong shape.
    """
    expected = expected_tensors(lola_hf_config(vllm_config))
    found: dict[str, tuple[int, ...]] = {}  # of LoLA's, so that all faults are told together
    latest = ""

    def good() -> Iterator[Named]:
        nonlocal latest
        for name, tensor in weights:
            latest = name
            values = tensor.float() if tensor.itemsize == 1 else tensor  # float8 cannot be asked
            if tensor.is_floating_point() and not bool(values.isfinite().all()):
                raise CheckpointError(f"{name}: holds values that are not finite (NaN or infinity)")
            if is_ours(name):
                found[name] = tuple(tensor.shape)
            if not is_ours(name) or expected.get(name) == found[name]:
                yield name, tensor

    try:
        loaded = load(good())
    except CheckpointError:
        raise
    except Exception as error:  # of vLLM's loaders, some without the tensor's name
        raise CheckpointError(f"{latest}: cannot be loaded ({error})") from error
    check_tensors(expected, found)
    unset = dict(model.named_parameters()).keys() - loaded
    if vllm_config.quant_config is not None and unset:
        # Some formats leave parameters at their defaults, so this alone is no fault.
        logger.warning("The quantized checkpoint does not set: %s", ", ".join(sorted(unset)))
    if current_platform.is_cpu() and vllm_config.model_config.dtype == torch.float32:
        keep_bfloat16(model)
    for module in model.modules():
        if isinstance(module, LolaAttention):
            module.weights_changed()
    return loaded
