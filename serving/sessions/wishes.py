"""Requests whose wish cannot be met are refused before they run.

A request says what it wants of the store in `kv_transfer_params.lola`, and names its session there
or by a session id. vLLM passes both on to the engine unread. The engine runs such a request without
the store and says why in the answer, which is too late: the conversation is not stored. So routes
answer 400 instead.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from lola_vllm.sessions.request import FIELD, read_wish


def refusing(generate: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """The engine client's `generate`, which refuses before it makes an iterator."""

    def generate_checked(
        prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        check_wish(sampling_params, kwargs.get("session_id"))
        return generate(prompt, sampling_params, *args, **kwargs)

    return generate_checked


def transfer_params(params: SamplingParams) -> Any:
    """The `kv_transfer_params` of a request, as they were sent."""
    return (params.extra_args or {}).get("kv_transfer_params")


def check_wish(params: Any, session_id: str | None) -> None:
    """Refuse a wish with faults, and several answers that would go on with one session.

    Raises:
        VLLMValidationError: names the field, the value and the remedy.
    """
    if not isinstance(params, SamplingParams):
        return
    wish = read_wish(transfer_params(params), session_id)
    if wish.faults:
        raise VLLMValidationError("; ".join(wish.faults), parameter=f"kv_transfer_params.{FIELD}")
    if wish.session is not None and params.n > 1:
        raise VLLMValidationError(
            f"n = {params.n}: a session goes on with one answer, and this request goes on with "
            f"{wish.session!r}; fork it to have several",
            parameter="n",
            value=params.n,
        )
