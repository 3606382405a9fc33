"""Bodies of requests: their size is bounded, and refusals are readable.

vLLM answers an invalid body with pydantic's records of the faults. Routes of `LolaRoute` name
field, value and remedy instead. They read no more bytes than any prompt can need, because a list of
millions is slow to check, and the API server sends no tokens to other requests meanwhile.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from lola_vllm.serving.protocol import MAX_BODY_BYTES

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import Message, Receive

MAX_FAULTS = 3


class LolaRoute(APIRoute):
    """A route with a bounded body and readable refusals."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with a bounded body before it and readable refusals after it."""
        handler = super().get_route_handler()

        async def bounded_handler(request: Request) -> Response:
            length = request.headers.get("content-length", "")
            if length.isdigit() and int(length) > MAX_BODY_BYTES:
                raise _too_large()
            try:
                return await handler(Request(request.scope, _bounded(request.receive)))
            except RequestValidationError as error:
                message, field = refusal(error.errors())
                answer = create_error_response(message, param=field)
                return JSONResponse(answer.model_dump(), answer.error.code)
            except HTTPException as error:
                if not error.headers:
                    raise
                # vLLM's handler leaves headers out, such as the time to ask again.
                status = HTTPStatus(error.status_code)
                answer = create_error_response(error.detail, status.phrase, status)
                return JSONResponse(answer.model_dump(), status, dict(error.headers))

        return bounded_handler


def _bounded(receive: Receive) -> Receive:
    """A body's messages, up to the limit; for requests without a content length."""
    size = 0

    async def receive_bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise _too_large()
        return message

    return receive_bounded


def _too_large() -> HTTPException:
    return HTTPException(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the body has more than {MAX_BODY_BYTES} bytes, which are read at most; "
        "give a shorter prompt",
    )


def refusal(errors: Sequence[Any]) -> tuple[str, str | None]:
    """What is wrong with a request, a line for each fault, and the first field with one.

    Args:
        errors: of FastAPI or pydantic: `{"type", "loc", "msg", "input"}`, or a text.
    """
    # vLLM's messages are a union over roles. Faults about the other roles are left out.
    errors = [
        e for e in errors if not isinstance(e, dict) or e["type"] != "literal_error"
    ] or errors
    reasons = list(dict.fromkeys(map(_reason, errors[:MAX_FAULTS])))  # unions repeat faults
    if len(errors) > MAX_FAULTS:
        reasons.append(f"and {len(errors) - MAX_FAULTS} more")
    return "\n".join(reasons), next(map(_field, errors), None) or None


def _reason(error: Any) -> str:
    if not isinstance(error, dict):
        return str(error)
    kind, field = error["type"], _field(error)
    if kind == "json_invalid":
        why = error.get("ctx", {}).get("error", error["msg"])
        return f"the body is no JSON: {why} at character {error['loc'][-1]}"
    if kind == "value_error":  # raised by this package; the message names the field
        return str(error["msg"]).removeprefix("Value error, ")
    where = field or "the body"
    if kind == "missing":
        return f"{where}: {error['msg']}"
    value = "null" if error["input"] is None else reprlib.repr(error["input"])
    return f"{where} = {value}: {error['msg']}"


def _field(error: Any) -> str:
    """Dotted, as the sender wrote it: FastAPI adds `body`, and pydantic the kinds of a union."""
    if not isinstance(error, dict) or error["type"] == "json_invalid":
        return ""
    return ".".join(
        str(part)
        for part in error["loc"]
        if part not in ("body", "str") and re.fullmatch(r"\d+|[a-z]\w*", str(part))
    )
