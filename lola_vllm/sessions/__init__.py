"""Stored states: a memory that outlives the request, the process and the machine.

Nothing here imports vLLM. `plugin/connector.py` joins the store to vLLM.
"""

from lola_vllm.sessions.cipher import StateKey, StateKeyError
from lola_vllm.sessions.file import StateFileError, StateHeader, read_state, write_state
from lola_vllm.sessions.manage import SessionError, SessionManager
from lola_vllm.sessions.names import Reference, SessionNameError, check_name, parse_reference
from lola_vllm.sessions.rows import RowKeeper
from lola_vllm.sessions.settings import StoreSettings, StoreSettingsError
from lola_vllm.sessions.store import NotStored, SessionStore, Turn

__all__ = [
    "NotStored",
    "Reference",
    "RowKeeper",
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
    "Turn",
    "check_name",
    "parse_reference",
    "read_state",
    "write_state",
]
