"""Requests that start from several sessions: `{"from": ["manual", "faq@2"]}`.

Their states are composed, and the request goes on from there: it sends what is new only. What was
composed is kept for a while under a name of the server's own, so the next request that names the
same turns in the same order starts at once.

The engine client's `generate` is the one method that all routes which generate call, so this is put
in front of it (`wrappers.py`). The engine is asked for one session, whose text stands before the
prompt.
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
from lola_vllm.memory.sessions.request import FIELD
from lola_vllm.serving.prompt import check_length
from lola_vllm.serving.sessions.management import check_composing
from lola_vllm.serving.sessions.request_params import check_params, transfer_params

if TYPE_CHECKING:
    from lola_vllm.serving.engine import LolaEngine
    from lola_vllm.serving.sessions.reporting import Generate

_FROM = f"kv_transfer_params.{FIELD}.from"
# What was composed is kept so long, for the next request that names the same turns.
COMPOSED_TTL = 3600.0


def composing(generate: Generate, engine: LolaEngine) -> Generate:
    """The engine client's `generate`, for requests that start from several sessions too."""

    def generate_composed(
        prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        sources = _sources(sampling_params)
        if sources is None:
            return generate(prompt, sampling_params, *args, **kwargs)
        # What else is wrong with the request is told before anything is composed for it.
        check_params(_starting(sampling_params, sources[0]), kwargs.get("session_id"))
        if not isinstance(prompt, dict) or not prompt.get("prompt_token_ids"):
            raise VLLMValidationError(
                "the prompt has no tokens, which follow those of the sessions; give text or token "
                "ids",
                parameter=_FROM,
            )
        return composed(prompt, sampling_params, sources, *args, **kwargs)

    async def composed(
        prompt: dict[str, Any],
        params: SamplingParams,
        sources: list[str],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        salt = prompt.get("cache_salt")
        try:
            check_composing(engine)
            session, said = await compose_for_request(engine, sources, salt)
            tokens = said["tokens"] + list(prompt["prompt_token_ids"])
            check_length(tokens, engine)
        except HTTPException as error:  # which a stream would tell as an error of the server's
            raise GracefulHTTPError(str(error.detail), HTTPStatus(error.status_code)) from None
        after = {name: value for name, value in prompt.items() if name != "prompt"}
        after["prompt_token_ids"] = tokens
        outputs: Any = generate(after, _starting(params, session), *args, **kwargs)
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    return generate_composed


async def compose_for_request(
    engine: LolaEngine, sources: list[str], salt: str | None
) -> tuple[str, dict[str, Any]]:
    """The server's own session that is composed of others, and its transcript.

    Args:
        salt: as `owners.owned` has it.

    Raises:
        HTTPException: a session that is missing, or sessions that do not go together.
    """
    made = await engine.sessions("compose_parts", sources=sources, salt=salt, ttl=COMPOSED_TTL)
    return made["session"], made


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
    params = copy.copy(sampling_params)
    given = transfer_params(params)
    lola = {**given[FIELD], "from": session}
    params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": {**given, FIELD: lola}}
    return params
