"""Routes that go on with a session: the caller sends the new part only.

The server has the token ids of a session beside its states. A request runs as one of vLLM's own
with all tokens as its prompt, of which the stored state covers all but the new ones.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.completion.api_router import create_completion
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from lola_vllm.memory.sessions.request import FIELD
from lola_vllm.serving.bodies import LolaRoute, refusal
from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.library.asking import asked_with, last_text
from lola_vllm.serving.prompt import check_length, prompt_tokens, text_tokens
from lola_vllm.serving.sessions.management import (
    PREFIX,
    REFUSALS,
    engine_of,
    json_body,
    lock_session,
    reference_of,
)
from lola_vllm.serving.sessions.owners import owned
from lola_vllm.serving.sessions.past import Recalled, read_library, recall
from lola_vllm.serving.sessions.protocol import (
    AppendRequest,
    AppendResponse,
    SessionChatRequest,
    SessionCompletionRequest,
)
from lola_vllm.serving.sessions.template_boundary import Transcript, continuation, ending
from lola_vllm.serving.sessions.wrappers import event, reported, spoken, told

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from lola_vllm.memory.sessions.names import Reference

STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}
DONE = "data: [DONE]"
Finish = Callable[[dict[str, Any]], Awaitable[None]]

router = APIRouter(
    prefix=PREFIX,
    tags=["lola"],
    route_class=LolaRoute,
    dependencies=json_body,
    responses=REFUSALS,
)


# Answers are not checked against their models: vLLM made them, or there is none as the client left.
@router.post("/{session}/append", response_model=None, responses={200: {"model": AppendResponse}})
@with_cancellation
async def append(session: str, raw_request: Request, body: AppendRequest) -> Any:
    """Read text, token ids or messages at the end of a session. Nothing is generated."""
    reference = reference_of(session)
    with await lock_session(engine_of(raw_request), reference, body.cache_salt):
        return await _append(reference, body, raw_request)


@router.post(
    "/{session}/chat",
    response_model=None,
    responses={200: {"model": ChatCompletionResponse, **STREAM}},
)
async def chat(session: str, raw_request: Request, body: SessionChatRequest) -> Any:
    """Answer new messages of a session, as /v1/chat/completions does with all of its messages."""
    return await _answer(session, raw_request, body, chat_way(raw_request, body))


@router.post(
    "/{session}/complete",
    response_model=None,
    responses={200: {"model": CompletionResponse, **STREAM}},
)
async def complete(session: str, raw_request: Request, body: SessionCompletionRequest) -> Any:
    """Go on with new text of a session, as /v1/completions does with all of its text."""
    if not body.prompt:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "prompt is empty; give text or token ids")
    return await _answer(session, raw_request, body, completion_way(raw_request, body))


class Way(NamedTuple):
    """How a route answers.

    Attributes:
        prompt: the tokens of a session and of what is new, which a text may stand before.
        generate: vLLM's answer to tokens, None where the session is new, and to what is asked of
            the store. end: tokens that end an answer. kind: of the objects in vLLM's stream.
    """

    prompt: Callable[..., Awaitable[list[int]]]
    generate: Callable[[list[int] | None, dict[str, Any]], Awaitable[Any]]
    end: Callable[[], Awaitable[list[int]]]
    kind: str


def chat_way(raw_request: Request, body: SessionChatRequest) -> Way:
    """Answer messages."""

    async def prompt(transcript: Transcript, before: str = "") -> list[int]:
        special = special_ids(engine_of(raw_request))
        asked = body.model_copy(update={"messages": asked_with(body.messages, before)})
        return await continuation(asked, transcript, raw_request, special)

    async def generate(tokens: list[int] | None, lola: dict[str, Any]) -> Any:
        params: dict[str, Any] = {FIELD: lola}
        if tokens is not None:
            params["prompt_token_ids"] = tokens
        request = body.model_copy(update={"kv_transfer_params": params})
        return await create_chat_completion(request, raw_request)

    async def end() -> list[int]:
        return await ending(body, raw_request)

    return Way(prompt, generate, end, "chat.completion.chunk")


def completion_way(raw_request: Request, body: SessionCompletionRequest) -> Way:
    """Go on with a text, or with token ids."""

    async def prompt(transcript: Transcript, before: str = "") -> list[int]:
        text = body.prompt
        if before and isinstance(text, str):
            text = f"\n{before}\n{text}"
        new = await text_tokens(text, raw_request) if isinstance(text, str) else text
        return transcript.before(special_ids(engine_of(raw_request))) + new

    async def generate(tokens: list[int] | None, lola: dict[str, Any]) -> Any:
        update = {"prompt": tokens or body.prompt, "kv_transfer_params": {FIELD: lola}}
        return await create_completion(body.model_copy(update=update), raw_request)

    async def end() -> list[int]:
        return []

    return Way(prompt, generate, end, "text_completion")


async def _answer(
    session: str,
    raw_request: Request,
    body: SessionChatRequest | SessionCompletionRequest,
    how: Way,
) -> Response:
    """Lock the session, and let vLLM answer."""
    reference, engine, salt = reference_of(session), engine_of(raw_request), body.cache_salt
    with ExitStack() as lock:
        lock.enter_context(await lock_session(engine, reference, salt))
        transcript = await _transcript(engine, reference, body)
        recalled = await _recalled(engine, reference, transcript, body)
        params = _params(reference, transcript, body.ttl)
        tokens: list[int] | None = None
        sources: list[dict[str, Any]] = []
        finish: Finish | None = None
        if recalled is not None and transcript is not None:
            finish = partial(
                _read_on, engine, how, transcript, params, salt, spoken(), recalled.said
            )
            made = {"reference": recalled.session, "salt": owned(salt)}
            lock.callback(lambda: engine.later(engine.sessions("delete", **made)))
            tokens = await how.prompt(recalled.transcript, recalled.before)
            params, sources = {"from": recalled.session, "save": False}, recalled.sources
        elif transcript is not None:
            tokens = await how.prompt(transcript)
        if tokens is not None:
            check_length(tokens, engine)
        return await answered(engine, how, tokens, params, sources, lock, finish)


async def answered(
    engine: LolaEngine,
    how: Way,
    tokens: list[int] | None,
    params: dict[str, Any],
    sources: list[dict[str, Any]],
    lock: ExitStack,
    finish: Finish | None = None,
) -> Response:
    """vLLM's answer, with the sources: a field of it, or of the first event and of the last before
    the end.

    Args:
        tokens, params: as of `Way.generate`. lock: that a stream takes over.
        finish: what is done before the end; it puts what the store says of it into a report.
    """
    report = reported()
    answer: Response = await how.generate(tokens, params)
    named: dict[str, Any] = {"sources": sources} if sources else {}
    if isinstance(answer, StreamingResponse):
        still = lock.pop_all()
        answer.body_iterator = _with_report(
            answer.body_iterator, engine, how.kind, report, named, finish, still
        )
        return LockedStream(answer, still)
    if isinstance(answer, JSONResponse) and answer.status_code == HTTPStatus.OK:
        if finish is not None:
            await finish(report)
            named |= {"kv_transfer_params": report}
        if named:
            return JSONResponse(json.loads(bytes(answer.body)) | named)
    return answer


async def _recalled(
    engine: LolaEngine,
    reference: Reference,
    transcript: Transcript | None,
    body: SessionChatRequest | SessionCompletionRequest,
) -> Recalled | None:
    """What a request that recalls or names a library is asked of, in place of the session; None:
    the session."""
    if body.recall is None and body.library is None:
        return None
    if isinstance(body, SessionChatRequest):
        question = last_text(body.messages)
    elif isinstance(body.prompt, str):
        question = body.prompt
    else:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "recall, library: prompt must be a text")
    name, salt = reference.session, body.cache_salt
    if body.library is not None and transcript is None:
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            f"library = {body.library!r}: there is no session {name!r} yet; begin it with POST "
            f"/v1/lola/libraries/{body.library}/chat and its field 'session'",
        )
    if transcript is None:
        return None
    if body.library is not None:
        return await read_library(engine, name, transcript, body.library, question, salt)
    return await recall(engine, name, transcript, question, salt)


async def _read_on(
    engine: LolaEngine,
    how: Way,
    transcript: Transcript,
    params: dict[str, Any],
    salt: str | None,
    spoken: list[int],
    recalled: dict[str, Any],
    report: dict[str, Any],
) -> None:
    """Read a question and its answer at the end of the session, which neither has seen: they were
    said behind a segment that came back, or a library's part.

    Args:
        spoken: tokens of the answer. recalled: what else the report is told.
    """
    ended = spoken and spoken[-1] in special_ids(engine)
    said = spoken[:-1] if ended else spoken
    tokens = await how.prompt(transcript) + said + await how.end()
    check_length(tokens, engine)
    request_id = f"lola-append-{uuid.uuid4().hex}"
    final = await engine.read(tokens, request_id, params | {"answer": False}, salt)
    report[FIELD] = (told(final) if final else {}) | recalled


async def _append(reference: Reference, body: AppendRequest, raw_request: Request) -> Any:
    engine = engine_of(raw_request)
    transcript = await _transcript(engine, reference, body)
    before = [] if transcript is None else transcript.before(special_ids(engine))
    if body.messages is not None and transcript is not None:
        tokens = await _messages(body, transcript, raw_request)
        new = len(tokens) - len(before)
    else:
        read = await prompt_tokens(
            body, raw_request, engine, begins=transcript is None, adapters=True
        )
        tokens, new = before + read, len(read)
    check_length(tokens, engine)
    params = _params(reference, transcript, body.ttl) | {"answer": False}
    final = await engine.read(
        tokens,
        f"lola-append-{uuid.uuid4().hex}",
        params,
        body.cache_salt,
        lora_request=raw_request.app.state.openai_serving_models.lora_requests.get(body.model),
    )
    said = told(final) if final else {}
    said = {"session": reference.session, "unsaved": None, "unwritten": None, **said}
    return said | {"tokens": len(tokens), "new_tokens": new}


async def _messages(body: AppendRequest, transcript: Transcript, raw_request: Request) -> list[int]:
    try:
        request = ChatCompletionRequest.model_validate(
            {"model": body.model, "messages": body.messages, "add_generation_prompt": False}
        )
    except ValidationError as error:
        message = refusal(error.errors())[0]
        raise HTTPException(HTTPStatus.BAD_REQUEST, message) from None
    return await continuation(request, transcript, raw_request, special_ids(engine_of(raw_request)))


async def _transcript(
    engine: LolaEngine,
    reference: Reference,
    body: AppendRequest | SessionChatRequest | SessionCompletionRequest,
) -> Transcript | None:
    """What a session has seen; None for a new one.

    Raises:
        HTTPException: it is not at the turn or has not the tokens that the body names, or is gone.
    """
    salt, expected = owned(body.cache_salt), body.turn
    try:
        found = await engine.sessions("tokens", reference=str(reference), salt=salt)
    except HTTPException as error:
        new = reference.turn is None and not expected and not body.tokens
        if error.status_code != HTTPStatus.NOT_FOUND or not new:
            raise
        return None
    transcript = Transcript(found["turn"], found["kind"], found["tokens"], found["tail"])
    if expected not in (None, transcript.turn):
        raise HTTPException(
            HTTPStatus.CONFLICT,
            f"turn = {expected}: {str(reference)!r} is at turn {transcript.turn}; look at "
            f"what it says, or fork {reference.session}@{expected}" if expected else
            f"turn = 0: there is a session {reference.session!r} already; take another name",
        )  # fmt: skip
    if body.tokens not in (None, len(transcript.tokens)):
        raise HTTPException(
            HTTPStatus.CONFLICT,
            f"tokens = {body.tokens}: turn {transcript.turn} of {reference.session!r} covers "
            f"{len(transcript.tokens)}, as its {transcript.kind} is the last that was kept; look "
            "at what it says, and send what is missing again",
        )
    return transcript


def _params(
    reference: Reference, transcript: Transcript | None, ttl: float | None
) -> dict[str, Any]:
    """`kv_transfer_params.lola` of a request."""
    params: dict[str, Any] = {"save": reference.session}
    if transcript is not None:
        # The next messages may leave out the end of a prompt that nobody answered (`continuation`).
        turn = f"@{transcript.turn}" if transcript.kind == "answer" else ""
        params["from"] = f"{reference.session}{turn}"
    if ttl is not None:
        params["ttl"] = ttl
    return params


def special_ids(engine: LolaEngine) -> list[int]:
    """Ids of the tokenizer that stand for no text."""
    tokenizer = engine.client.renderer.tokenizer
    return [] if tokenizer is None else list(tokenizer.all_special_ids)


async def _with_report(
    events: Any,
    engine: LolaEngine,
    kind: str,
    report: dict[str, Any],
    sources: dict[str, Any],
    finish: Finish | None,
    lock: ExitStack,
) -> AsyncIterator[Any]:
    """A stream of events, with the sources at its begin and, before its end, what the store says.
    At that the session is free: a client that has read it may go on at once.

    Args:
        kind: of the objects in the stream. report: of `reported`. sources: `{"sources": list}`, or
            empty. finish: as of `answered`.
    """
    if sources:
        yield event(engine.model, kind, **sources)
    async for said in events:
        text = said if isinstance(said, str) else bytes(said).decode()
        if text.startswith(DONE):
            if finish is not None:
                await finish(report)
            if report or sources:
                yield event(engine.model, kind, kv_transfer_params=report, **sources)
            lock.close()
        yield said


class LockedStream(StreamingResponse):
    """A stream that holds a lock until it has ended, or its reader has left."""

    def __init__(self, answer: StreamingResponse, lock: ExitStack) -> None:
        super().__init__(
            answer.body_iterator,
            answer.status_code,
            media_type=answer.media_type,
            background=answer.background,
        )
        self._lock = lock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._lock:
            await super().__call__(scope, receive, send)
