"""LoLA's own KV connector by name, and which of vLLM's can move LoLA's states.

To vLLM's a state is the block of a Mamba layer. The reasons are from the sources of vLLM 0.32; none
of these connectors has been run with a LoLA model, as each needs a GPU or a service.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# The connector of stored states. Names, as vLLM imports it where it is needed.
CONNECTOR, CONNECTOR_MODULE = "LolaStateConnector", "lola_vllm.engine.vllm.connector"

# They move whole blocks of Mamba layers.
ON_GPU = ("OffloadingConnector",)
IN_ALIGN_MODE = ("MooncakeStoreConnector",)

REMEDY = "remove the option; LoLA's own store is --additional-config '{\"lola\": {...}}'"


def has_store(vllm_config: VllmConfig) -> bool:
    """Whether states are stored."""
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR


def unfit(name: str | None, vllm_config: VllmConfig) -> str | None:
    """Why a connector cannot be used with a LoLA model; None if it can, by its source."""
    from vllm.platforms import current_platform

    if name in ON_GPU:
        if current_platform.is_cpu():
            return f"it copies between a GPU and the host, and this is a CPU; {REMEDY}"
        return None
    if name in IN_ALIGN_MODE:
        if not vllm_config.cache_config.enable_prefix_caching:
            return "it stores the states at block boundaries; use --enable-prefix-caching with it"
        return None
    return f"it divides a state, or is not known to move whole states; {REMEDY}"


def offloading_connector(vllm_config: VllmConfig) -> str | None:
    """The connector that `--kv-offloading-size` stands for."""
    if vllm_config.cache_config.kv_offloading_backend != "native":
        return "LMCacheMPConnector"
    from vllm import envs

    simple = getattr(envs, "VLLM_USE_SIMPLE_KV_OFFLOAD", False)
    return "SimpleCPUOffloadConnector" if simple else "OffloadingConnector"
