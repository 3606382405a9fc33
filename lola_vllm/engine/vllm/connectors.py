"""LoLA's own KV connector by name.

vLLM's are refused. None has been run with a LoLA model, and most divide a state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# The connector of stored states. Names, as vLLM imports it where it is needed.
CONNECTOR, CONNECTOR_MODULE = "LolaStateConnector", "lola_vllm.engine.vllm.connector"


def has_store(vllm_config: VllmConfig) -> bool:
    """Whether states are stored."""
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR
