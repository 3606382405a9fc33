"""Requests with parameters for the store that cannot be met are refused before they run.

A request says what it wants of the store in `kv_transfer_params.lola`, and names its session there
or by a session id. vLLM passes both on to the engine unread. The engine runs such a request without
the store and says why in the answer, which is too late: the conversation is not stored. So routes
answer 400 instead.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from lola_vllm.memory.sessions.request import FIELD, OWN_REQUESTS, read_params

if TYPE_CHECKING:
    from lola_vllm.serving.sessions.reporting import Generate


def checking_params(generate: Generate) -> Generate:
    """The engine client's `generate`, which refuses before it makes an iterator."""

    def generate_checked(
        prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        request_id = str(args[0] if args else kwargs.get("request_id", ""))
        own = request_id.startswith(OWN_REQUESTS)
        check_params(sampling_params, kwargs.get("session_id"), own)
        return generate(prompt, sampling_params, *args, **kwargs)

    return generate_checked


def transfer_params(params: SamplingParams) -> Any:
    """The `kv_transfer_params` of a request, as they were sent."""
    return (params.extra_args or {}).get("kv_transfer_params")


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
