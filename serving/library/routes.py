"""Routes under /v1/lola/libraries: to keep documents, and to ask them."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import StreamingResponse
from starlette.responses import Response
from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from lola_vllm.memory.documents.choose import FOUND
from lola_vllm.memory.sessions.names import addition_of
from lola_vllm.serving.bodies import LolaRoute
from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.library import asking
from lola_vllm.serving.library.adding import (
    check_libraries,
    check_place,
    cut,
    drop_addition,
    read_parts,
)
from lola_vllm.serving.library.protocol import (
    AddRequest,
    Document,
    FindRequest,
    Found,
    LibraryChatRequest,
    LibraryCompletionRequest,
    LibraryDetail,
    LibraryList,
)
from lola_vllm.serving.prompt import check_length
from lola_vllm.serving.protocol import check_utf8
from lola_vllm.serving.sessions.generate import (
    DONE,
    STREAM,
    LockedStream,
    Way,
    answered,
    chat_way,
    completion_way,
)
from lola_vllm.serving.sessions.management import (
    REFUSALS,
    Salt,
    ask,
    check_listing,
    engine_of,
    json_body,
    lock,
    name_of,
)
from lola_vllm.serving.sessions.owners import owned
from lola_vllm.serving.sessions.protocol import Deleted
from lola_vllm.serving.sessions.template_boundary import Transcript

PREFIX = "/v1/lola/libraries"
_BUSY: dict[int | str, dict[str, Any]] = {429: {"model": ErrorResponse}}

router = APIRouter(prefix=PREFIX, tags=["lola"], route_class=LolaRoute, responses=REFUSALS)


@router.get("", response_model=LibraryList, responses={403: {"model": ErrorResponse}})
async def libraries(raw_request: Request, salt: Salt = None) -> dict[str, Any]:
    """The caller's libraries, by name; where sessions are listed."""
    check_listing(raw_request)
    return {"libraries": await ask(raw_request, "libraries", salt)}


@router.get("/{library}", response_model=LibraryDetail)
async def show(library: str, raw_request: Request, salt: Salt = None) -> Any:
    """A library with its documents."""
    return await ask(raw_request, "library", salt, library=name_of(library, "library"))


@router.delete("/{library}", response_model=Deleted)
async def delete(library: str, raw_request: Request, salt: Salt = None) -> Any:
    """Delete a library with all of its documents."""
    answer = await ask(raw_request, "remove_documents", salt, library=name_of(library, "library"))
    engine_of(raw_request).words.forget(owned(salt), library)
    return answer


@router.delete("/{library}/documents/{document:path}", response_model=Deleted)
async def remove(library: str, document: str, raw_request: Request, salt: Salt = None) -> Any:
    """Delete a document, and what was composed of it to answer questions."""
    answer = await ask(
        raw_request,
        "remove_documents",
        salt,
        library=name_of(library, "library"),
        document=document,
    )
    engine_of(raw_request).words.forget(owned(salt), library)
    return answer


@router.post(
    "/{library}/documents",
    response_model=None,
    responses={200: {"model": Document, **STREAM}},
    dependencies=json_body,
)
@with_cancellation
async def add(library: str, raw_request: Request, body: AddRequest) -> Any:
    """Read a document, in parts, and keep what was read. A library begins with its first."""
    name, engine = name_of(library, "library"), engine_of(raw_request)
    check_libraries(engine)
    with ExitStack() as held:
        adding = (
            f"document = {body.document!r}: another request is adding it to {name!r}; wait for its "
            "answer, or take another title"
        )
        document = f"{name}/{body.document}"
        held.enter_context(await lock(engine, document, body.cache_salt, adding))
        await check_place(engine, name, body)
        parts = await cut(engine, body)
        addition = secrets.token_hex(12)
        if body.stream:
            events = _events(engine, name, body, parts, addition)
            stream = StreamingResponse(events, media_type="text/event-stream")
            return LockedStream(stream, held.pop_all())
        async for _ in read_parts(engine, name, body, parts, addition):
            pass
        return await _document(engine, name, body, addition)


@router.post(
    "/{library}/find",
    response_model=None,
    responses={**_BUSY, 200: {"model": Found}},
    dependencies=json_body,
)
@with_cancellation
async def find(library: str, raw_request: Request, body: FindRequest) -> Any:
    """What a question reads of a library, and nothing is generated."""
    engine = engine_of(raw_request)
    check_libraries(engine)
    validate_cache_salt(body.cache_salt)
    sources, _ = await asking.find(
        engine, name_of(library, "library"), body.question, body.top, body.cache_salt
    )
    return Found.model_validate({"sources": sources})


@router.post(
    "/{library}/chat",
    response_model=None,
    responses={**_BUSY, 200: {"model": ChatCompletionResponse, **STREAM}},
    dependencies=json_body,
)
async def chat(library: str, raw_request: Request, body: LibraryChatRequest) -> Any:
    """Answer messages from what they read of a library, and name the sources."""
    question = body.question or asking.last_text(body.messages)
    return await _answer(library, raw_request, body, question, chat_way(raw_request, body))


@router.post(
    "/{library}/complete",
    response_model=None,
    responses={**_BUSY, 200: {"model": CompletionResponse, **STREAM}},
    dependencies=json_body,
)
async def complete(library: str, raw_request: Request, body: LibraryCompletionRequest) -> Any:
    """Go on with a text from what it reads of a library, and name the sources."""
    if not isinstance(body.prompt, str) or not body.prompt.strip():
        raise HTTPException(
            HTTPStatus.BAD_REQUEST, "prompt: must be a text, which is asked of the library"
        )
    question = body.question or body.prompt
    return await _answer(library, raw_request, body, question, completion_way(raw_request, body))


async def _answer(
    library: str,
    raw_request: Request,
    body: LibraryChatRequest | LibraryCompletionRequest,
    question: str,
    how: Way,
) -> Response:
    """vLLM's answer from the first part that a question reads, next to the passages of the others.
    The session that was made for it goes where that is refused."""
    engine, salt = engine_of(raw_request), body.cache_salt
    name = name_of(library, "library")
    check_libraries(engine)
    validate_cache_salt(salt)
    try:
        check_utf8("question", question)
        check_utf8("cache_salt", salt or "")
    except ValueError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from None
    made = {"session": body.session, "ttl": body.ttl}
    sources, said = await asking.find(engine, name, question, FOUND, salt, made)
    params: dict[str, Any] = {"from": said["session"], "save": body.session or False}
    if body.session and body.ttl is not None:
        params["ttl"] = body.ttl
    kept = False
    try:
        transcript = Transcript(said["turn"], said["kind"], said["tokens"], said["tail"])
        tokens = await how.prompt(transcript, asking.with_passages(sources))
        check_length(tokens, engine)
        answer = await answered(engine, how, tokens, params, sources, ExitStack())
        kept = answer is None or answer.status_code == HTTPStatus.OK  # None: nobody waits
        return answer
    except asyncio.CancelledError:  # the client has left, and may go on later
        kept = True
        raise
    finally:
        if not kept and body.session is not None:
            with suppress(HTTPException):
                await engine.sessions("delete", reference=body.session, salt=owned(salt))


async def _events(
    engine: LolaEngine, library: str, body: AddRequest, parts: list[list[int]], addition: str
) -> AsyncIterator[str]:
    """An event for each part that was read, and one for the document."""
    try:
        async for part in read_parts(engine, library, body, parts, addition):
            yield f"data: {json.dumps(part)}\n\n"
        yield f"data: {json.dumps(await _document(engine, library, body, addition))}\n\n"
    except HTTPException as error:
        refused = {"message": error.detail, "code": error.status_code}
        yield f"data: {json.dumps({'error': refused})}\n\n"
    yield f"{DONE}\n\n"


async def _document(
    engine: LolaEngine, library: str, body: AddRequest, addition: str
) -> dict[str, Any]:
    """The document that was added, in place of what it replaces."""
    found = await engine.sessions("library", library=library, salt=owned(body.cache_salt))
    for document in found["documents"]:
        if addition_of(document["parts"][0]["session"]) == addition:
            return Document.model_validate(document).model_dump()
    drop_addition(engine, library, body, addition)
    raise HTTPException(
        HTTPStatus.SERVICE_UNAVAILABLE,
        f"document = {body.document!r}: the budgets have no room for all of its parts; raise "
        "--lola-state-ram, or give the server a --lola-state-dir",
    )
