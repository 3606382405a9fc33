"""What the store says of a request, for the route that asked: vLLM leaves it out of streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from lola_vllm.memory.sessions.request import FIELD

# The engine client's: (prompt, sampling params, request id, ...) -> outputs
Generate = Callable[..., AsyncIterator[Any]]

_report: ContextVar[dict[str, Any] | None] = ContextVar("lola_report", default=None)
_said: ContextVar[list[int] | None] = ContextVar("lola_said", default=None)


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


def with_report(generate: Generate) -> Generate:
    """The engine client's `generate`, which fills the dict of `reported`."""

    def generate_reporting(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        outputs = generate(*args, **kwargs)
        report, said = _report.get(), _said.get()
        _said.set(None)  # of the first request alone
        return outputs if report is None else _reporting(outputs, report, said)

    return generate_reporting


async def _reporting(
    outputs: Any, report: dict[str, Any], said: list[int] | None
) -> AsyncIterator[Any]:
    async with aclosing(outputs):
        async for output in outputs:
            report.update(output.kv_transfer_params or {})
            if said is not None and output.outputs:
                said += output.outputs[0].token_ids
            yield output
