"""What stands in front of the engine client's `generate`, the one method that all routes which
generate call.

A request gets the salt of its owner (`owners.py`). What it asks of the store is checked before it
runs: the engine would run it without the store and say why in the answer, which is too late. A
request that starts from several sessions, `{"from": ["manual", "faq@2"]}`, is asked of the one that
is composed of them, whose text stands before the prompt. The route is told what the store says
(`reporting.py`).
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from contextlib import aclosing
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from lola_vllm.memory.sessions.names import MAX_SOURCES, SessionNameError, parse_reference
from lola_vllm.memory.sessions.request import FIELD, LIBRARY_REQUEST, read_params
from lola_vllm.serving.prompt import check_length
from lola_vllm.serving.sessions.management import check_composing
from lola_vllm.serving.sessions.owners import NO_KEY, is_nobody, salted
from lola_vllm.serving.sessions.reporting import Generate, take_report, told, transfer_params

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

    from lola_vllm.serving.engine import LolaEngine

_FROM = f"kv_transfer_params.{FIELD}.from"


def wrap_generate(client: EngineClient, engine: LolaEngine | None = None) -> None:
    """Replace `client.generate`, which then also does what this module says.

    Args:
        engine: that has a store; None: nothing is stored.
    """
    plain: Generate = client.generate

    def generate(
        prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        keyless, sources = engine is not None and is_nobody(), None
        prompt = salted(prompt)
        if keyless:
            nothing = {FIELD: {"from": False, "save": False}}
            sampling_params = _asking(sampling_params, nothing)
        if engine is not None:
            sources = _sources(sampling_params)
            asked = sampling_params if sources is None else _starting(sampling_params, sources[0])
            request_id = str(args[0] if args else kwargs.get("request_id", ""))
            check_params(asked, kwargs.get("session_id"), request_id.startswith(LIBRARY_REQUEST))
        if engine is None or sources is None:
            outputs = plain(prompt, sampling_params, *args, **kwargs)
        else:
            _check_tokens(prompt)
            outputs = composed(engine, prompt, sampling_params, sources, *args, **kwargs)
        report, said = take_report()
        return outputs if report is None and not keyless else _told(outputs, report, said, keyless)

    async def composed(
        engine: LolaEngine,
        prompt: dict[str, Any],
        params: SamplingParams,
        sources: list[str],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        try:
            check_composing(engine)
            salt = prompt.get("cache_salt")
            made = await engine.sessions("compose_parts", sources=sources, salt=salt)
            tokens = made["tokens"] + list(prompt["prompt_token_ids"])
            check_length(tokens, engine)
        except HTTPException as error:  # which a stream would tell as an error of the server's
            raise GracefulHTTPError(str(error.detail), HTTPStatus(error.status_code)) from None
        after = {name: value for name, value in prompt.items() if name != "prompt"}
        after["prompt_token_ids"] = tokens
        outputs: Any = plain(after, _starting(params, made["session"]), *args, **kwargs)
        async with aclosing(outputs):
            async for output in outputs:
                yield output

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
    params = read_params(transfer_params(sampling_params), session_id, own)
    if params.faults:
        raise VLLMValidationError("; ".join(params.faults), parameter=f"kv_transfer_params.{FIELD}")
    if params.session is not None and sampling_params.n > 1:
        raise VLLMValidationError(
            f"n = {sampling_params.n}: a session goes on with one answer, and this request goes on "
            f"with {params.session!r}; fork it to have several",
            parameter="n",
            value=sampling_params.n,
        )


def _check_tokens(prompt: Any) -> None:
    if not isinstance(prompt, dict) or not prompt.get("prompt_token_ids"):
        raise VLLMValidationError(
            "the prompt has no tokens, which follow those of the sessions; give text or token ids",
            parameter=_FROM,
        )


def _sources(sampling_params: Any) -> list[str] | None:
    """The sessions that a request starts from, where it names a list of them.

    Raises:
        VLLMValidationError: the list is empty or too long, or names what no session is called.
    """
    if not isinstance(sampling_params, SamplingParams):
        return None
    params = transfer_params(sampling_params)
    lola = params.get(FIELD) if isinstance(params, dict) else None
    sources = lola.get("from") if isinstance(lola, dict) else None
    if not isinstance(sources, list):
        return None
    if not 1 <= len(sources) <= MAX_SOURCES:
        raise VLLMValidationError(
            f"{_FROM}: {len(sources)} sessions; give 1 to {MAX_SOURCES} to compose", parameter=_FROM
        )
    try:
        for source in sources:
            parse_reference(source, _FROM)
    except SessionNameError as error:
        raise VLLMValidationError(str(error), parameter=_FROM) from None
    return sources


def _starting(sampling_params: SamplingParams, session: str) -> SamplingParams:
    """Sampling parameters of a request that starts from one session."""
    given = transfer_params(sampling_params)
    return _asking(sampling_params, {**given, FIELD: {**given[FIELD], "from": session}})


def _asking(params: Any, transfer: dict[str, Any]) -> Any:
    """Sampling parameters with other `kv_transfer_params`."""
    found = copy.copy(params)
    found.extra_args = {**(params.extra_args or {}), "kv_transfer_params": transfer}
    return found


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
