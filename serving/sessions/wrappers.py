"""What stands in front of the engine client's `generate`, the one method that all routes which
generate call.

A request gets the salt of its owner (`owners.py`). What it asks of the store is checked before it
runs: the engine would run it without the store and say why in the answer, which is too late. The
route is told what the store says, which vLLM leaves out of streams.
"""

from __future__ import annotations

import copy
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from lola_vllm.memory.sessions.request import FIELD, LIBRARY_REQUEST, read_params
from lola_vllm.serving.sessions.owners import NO_KEY, is_nobody, salted

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

# The engine client's: (prompt, sampling params, request id, ...) -> outputs
Generate = Callable[..., AsyncIterator[Any]]

_report: ContextVar[dict[str, Any] | None] = ContextVar("lola_report", default=None)
_said: ContextVar[list[int] | None] = ContextVar("lola_said", default=None)


def wrap_generate(client: EngineClient, stores: bool = False) -> None:
    """Replace `client.generate`, which then also does what this module says.

    Args:
        stores: whether anything is stored.
    """
    plain: Generate = client.generate

    def generate(
        prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        keyless = stores and is_nobody()
        if keyless:
            nothing = {FIELD: {"from": False, "save": False}}
            given = sampling_params.extra_args or {}
            sampling_params = copy.copy(sampling_params)
            sampling_params.extra_args = {**given, "kv_transfer_params": nothing}
        if stores:
            request_id = str(args[0] if args else kwargs.get("request_id", ""))
            own = request_id.startswith(LIBRARY_REQUEST)
            check_params(sampling_params, kwargs.get("session_id"), own)
        outputs = plain(salted(prompt), sampling_params, *args, **kwargs)
        report, said = _report.get(), _said.get()
        _said.set(None)  # it gets the tokens of the first request that a route makes
        return outputs if report is None and not keyless else _told(outputs, report, said, keyless)

    client.generate = generate  # type: ignore[method-assign,assignment]


def check_params(sampling_params: Any, session_id: str | None, own: bool = False) -> None:
    """Refuse parameters with faults, and several answers that would go on with one session.

    Args:
        own: whether the request is the server's, which may use names of its own.

    Raises:
        VLLMValidationError: names the field, the value and the remedy.
    """
    if not isinstance(sampling_params, SamplingParams):
        return
    given = (sampling_params.extra_args or {}).get("kv_transfer_params")
    params = read_params(given, session_id, own)
    if params.faults:
        raise VLLMValidationError("; ".join(params.faults), parameter=f"kv_transfer_params.{FIELD}")
    if params.session is not None and sampling_params.n > 1:
        raise VLLMValidationError(
            f"n = {sampling_params.n}: a session goes on with one answer, and this request goes on "
            f"with {params.session!r}; fork it to have several",
            parameter="n",
            value=sampling_params.n,
        )


async def _told(
    outputs: Any, report: dict[str, Any] | None, said: list[int] | None, keyless: bool
) -> AsyncIterator[Any]:
    """The outputs of a request, of which its route is told. Those of one without a key say why it
    has no states."""
    async with aclosing(outputs):
        async for output in outputs:
            if keyless and (states := told(output)):
                states = {**states, "reason": NO_KEY, "unsaved": NO_KEY}
                output.kv_transfer_params = {FIELD: states}
            if report is not None:
                report.update(output.kv_transfer_params or {})
            if said is not None and output.outputs:
                said += output.outputs[0].token_ids
            yield output


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
