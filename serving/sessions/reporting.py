"""What a request asks of the store, and what the store says of it, for the route that asked: vLLM
leaves it out of streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from lola_vllm.memory.sessions.request import FIELD

if TYPE_CHECKING:
    from vllm import SamplingParams

# The engine client's: (prompt, sampling params, request id, ...) -> outputs
Generate = Callable[..., AsyncIterator[Any]]

_report: ContextVar[dict[str, Any] | None] = ContextVar("lola_report", default=None)
_said: ContextVar[list[int] | None] = ContextVar("lola_said", default=None)


def transfer_params(params: SamplingParams) -> Any:
    """The `kv_transfer_params` of a request, as they were sent."""
    return (params.extra_args or {}).get("kv_transfer_params")


def told(output: Any) -> dict[str, Any]:
    """What an output of the engine says of its states; empty where it says nothing."""
    found: dict[str, Any] = (output.kv_transfer_params or {}).get(FIELD, {})
    return found


def reported() -> dict[str, Any]:
    """A dict that gets the `kv_transfer_params` of the answer to this request."""
    found: dict[str, Any] = {}
    _report.set(found)
    return found


def spoken() -> list[int]:
    """A list that gets the tokens of the answer to this request, as long as it is generated."""
    found: list[int] = []
    _said.set(found)
    return found


def take_report() -> tuple[dict[str, Any] | None, list[int] | None]:
    """What gets the parameters of this request's answer, and its tokens. These are those of the
    first request alone that a route makes."""
    found = _report.get(), _said.get()
    _said.set(None)
    return found


def event(model: str, kind: str, **fields: Any) -> str:
    """An event of a stream, in the form of vLLM's.

    Args:
        kind: of the objects in the stream. fields: what it tells besides no words.
    """
    said = {
        "id": f"lola-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
        "model": model, "choices": [], **fields,
    }  # fmt: skip
    return f"data: {json.dumps(said)}\n\n"
