"""Documents are added to a library: each part of one is read, as a request of the server's own."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException

from lola_vllm.memory.documents.parts import PART_TOKENS, SHARED_TOKENS, split_text
from lola_vllm.memory.sessions.names import MAX_PARTS, Part, part_session
from lola_vllm.memory.sessions.request import LIBRARY_REQUEST
from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.sessions.management import check_composing
from lola_vllm.serving.sessions.owners import owned
from lola_vllm.serving.sessions.wrappers import told

if TYPE_CHECKING:
    from lola_vllm.serving.library.protocol import AddRequest


def check_libraries(engine: LolaEngine) -> None:
    """Refuse what needs libraries where there can be none.

    Raises:
        HTTPException: 501, with the reason and the remedy.
    """
    engine.check()
    reason = engine.readable()
    parallel = engine.config.parallel_config
    if reason is None and parallel.world_size > 1:
        reason = f"libraries need a model on one rank, and this one has {parallel.world_size}"
    if reason is None and engine.client.renderer.tokenizer is None:
        reason = "the server has no tokenizer (--skip-tokenizer-init), and documents are texts"
    if reason is not None:
        raise HTTPException(HTTPStatus.NOT_IMPLEMENTED, reason)
    check_composing(engine)


async def cut(engine: LolaEngine, body: AddRequest) -> list[list[int]]:
    """The token ids of each part of a document.

    Raises:
        HTTPException: parts that are too long for the model, too many, or a text that is too short
        to be composed with others.
    """
    longest = most_tokens(engine) - 4 * SHARED_TOKENS
    most = min(PART_TOKENS, longest) if body.part_tokens is None else body.part_tokens
    if most > longest:
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            f"part_tokens = {body.part_tokens}: at most {longest} leave room for a question",
        )
    tokenizer: Any = engine.client.renderer.tokenizer
    left = threading.Event()

    def encoded(text: str) -> list[int]:
        if left.is_set():
            raise InterruptedError("nobody waits for the parts")
        return list(tokenizer.encode(text))

    def work() -> list[list[int]]:
        return [
            encoded(text) for text in split_text(body.text, most, lambda text: len(encoded(text)))
        ]

    try:
        parts = await asyncio.to_thread(work)  # a long text takes a while
    finally:
        left.set()  # a client that leaves cancels this, and the thread goes on else
    least = max(engine.page.update_interval, engine.page.sink_size)
    if not parts or len(parts[0]) < least:
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            f"text: {len(parts[0]) if parts else 0} tokens, and a document needs {least} or more; "
            "put it into one document with another",
        )
    if len(parts) > MAX_PARTS:
        raise HTTPException(
            HTTPStatus.BAD_REQUEST, f"text: {len(parts)} parts, and at most {MAX_PARTS} are read"
        )
    return parts


def most_tokens(engine: LolaEngine) -> int:
    """The longest that a part and a question can be together: what the model was trained on."""
    trained = int(engine.config.model_config.hf_config.max_position_embeddings)
    return min(trained, int(engine.config.model_config.max_model_len) - 1)


async def check_place(engine: LolaEngine, library: str, body: AddRequest) -> None:
    """Refuse a document of which there is one, unless it is to be replaced.

    Raises:
        HTTPException: 409.
    """
    if body.replace:
        return
    try:
        found = await engine.sessions("library", library=library, salt=owned(body.cache_salt))
    except HTTPException as error:
        if error.status_code != HTTPStatus.NOT_FOUND:
            raise
        return
    if body.document in {document["document"] for document in found["documents"]}:
        raise HTTPException(
            HTTPStatus.CONFLICT,
            f"document = {body.document!r}: there is such a document in {library!r} already; send "
            '"replace": true, or take another title',
        )


async def read_parts(
    engine: LolaEngine, library: str, body: AddRequest, parts: list[list[int]], addition: str
) -> AsyncIterator[dict[str, Any]]:
    """Read the parts of a document, one after the other, and tell of each.

    With the last of them the document is there, in place of one of its title. If a part cannot be
    stored, those before it go, and the document that was there stays.

    Args:
        addition: as of `part_session`.

    Raises:
        HTTPException: a part was not stored.
    """
    complete = False
    try:
        for number, tokens in enumerate(parts, start=1):
            part = Part(library, body.document, number, len(parts))
            name = part_session(addition, number)
            await read_part(engine, part, name, tokens, body.ttl, body.cache_salt)
            complete = number == len(parts)
            yield {"part": number, "parts": len(parts), "session": name, "tokens": len(tokens)}
    finally:
        if not complete:
            drop_addition(engine, library, body, addition)


def drop_addition(engine: LolaEngine, library: str, body: AddRequest, addition: str) -> None:
    """Delete the parts of an addition, in the background."""
    gone = {"library": library, "document": body.document, "addition": addition}
    engine.later(engine.sessions("remove_documents", **gone, salt=owned(body.cache_salt)))


async def read_part(
    engine: LolaEngine,
    part: Part,
    session: str,
    tokens: list[int],
    ttl: float | None,
    salt: str | None,
) -> None:
    """Read a part, apart from all else.

    Args:
        session: `part_session`, which is to be its state. ttl: seconds. salt: the caller's.

    Raises:
        HTTPException: it was not stored.
    """
    params = {"from": False, "save": session, "answer": False, "part": list(part)}
    if ttl is not None:
        params["ttl"] = ttl
    request_id = f"{LIBRARY_REQUEST}{uuid.uuid4().hex}"
    final = await engine.read(tokens, request_id, params, salt)
    said = told(final) if final else {}
    reason = said.get("unsaved") or said.get("unwritten")
    if said.get("session") != session or reason:
        raise HTTPException(
            HTTPStatus.SERVICE_UNAVAILABLE,
            f"part {part.part} of {part.parts} was not stored ({reason or said.get('reason')}); "
            "the document is not in the library",
        )
