"""Stored states: a memory that outlives the request, the process and the machine.

Nothing here imports vLLM. `engine/vllm/connector.py` joins the store to vLLM. Importing this
package, its names and its settings loads no torch, so that the commands that ask a server start at
once; the other names are imported when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lola_vllm.memory.sessions.names import (
    MAX_SOURCES,
    Reference,
    SessionNameError,
    check_name,
    check_new_name,
    parse_reference,
)
from lola_vllm.memory.sessions.settings import StoreSettings, StoreSettingsError

if TYPE_CHECKING:
    from lola_vllm.memory.sessions.answers import SessionError
    from lola_vllm.memory.sessions.catalog import NotStored
    from lola_vllm.memory.sessions.cipher import StateKey, StateKeyError
    from lola_vllm.memory.sessions.file import StateFileError, StateHeader, read_state, write_state
    from lola_vllm.memory.sessions.manager import SessionManager
    from lola_vllm.memory.sessions.store import SessionStore, Turn
    from lola_vllm.memory.sessions.transfer import TransferWorker

__all__ = [
    "MAX_SOURCES",
    "NotStored",
    "Reference",
    "SessionError",
    "SessionManager",
    "SessionNameError",
    "SessionStore",
    "StateFileError",
    "StateHeader",
    "StateKey",
    "StateKeyError",
    "StoreSettings",
    "StoreSettingsError",
    "TransferWorker",
    "Turn",
    "check_name",
    "check_new_name",
    "parse_reference",
    "read_state",
    "write_state",
]
_MODULES = {
    "answers": ("SessionError",),
    "catalog": ("NotStored",),
    "cipher": ("StateKey", "StateKeyError"),
    "file": ("StateFileError", "StateHeader", "read_state", "write_state"),
    "manager": ("SessionManager",),
    "store": ("SessionStore", "Turn"),
    "transfer": ("TransferWorker",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
