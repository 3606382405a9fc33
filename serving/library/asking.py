"""What a question reads of a library, and what is composed to answer it."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException

from lola_vllm.memory.documents.choose import CANDIDATES
from lola_vllm.memory.documents.passage import Passage, before_question, passage_of
from lola_vllm.memory.sessions.request import LIBRARY_REQUEST
from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.library.adding import most_tokens
from lola_vllm.serving.library.words import KnownPart
from lola_vllm.serving.sessions.owners import caller, owned

POLL_S = 0.02  # between two looks whether documents were found
# Texts of parts whose words are indexed: more would keep the engine from its steps.
TEXTS_AT_ONCE = 16

Answer = dict[str, Any]


async def find(
    engine: LolaEngine,
    library: str,
    question: str,
    top: int,
    salt: str | None,
    made: Answer | None = None,
) -> tuple[list[Answer], Answer]:
    """The parts of a library that a question reads, the most first, as `protocol.Source` has them,
    and what an answer goes on from.

    Args:
        made: as of `Questions.found`, whose `transcript` is the second part of the answer; None: it
            is empty. The others: as for `ask_parts`.

    Raises:
        HTTPException: there is no such library, or the question is too long, or too many wait.
    """
    parts, answer = await ask_parts(engine, question, top, salt, library, made=made)
    found = [await source_of(engine, parts, one, question) for one in answer["found"]]
    total = sum(source["score"] for source in found)
    for source in found:
        source["share"] = source["score"] / total if total else 1 / len(found)
    return found, answer.get("transcript", {})


async def ask_parts(
    engine: LolaEngine,
    question: str,
    top: int,
    salt: str | None,
    library: str | None = None,
    segments: Answer | None = None,
    made: Answer | None = None,
) -> tuple[list[KnownPart], Answer]:
    """The parts that a question is asked of, and what it reads of them: `Questions.found`.

    Args:
        salt: the caller's. library, segments: as for `Questions.hear`.
    """
    tokenizer: Any = engine.client.renderer.tokenizer
    text, owner = f"\n{question.strip()}", owned(salt)
    asked = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=False)
    async with _question(engine) as request:
        async with engine.hearing:
            heard = await _answer(
                engine, "hear", request=request, asked=len(asked), top=top, salt=owner,
                library=library, segments=segments,
            )  # fmt: skip
            parts = [KnownPart(*part) for part in heard["parts"]]
            room = most_tokens(engine) - len(heard["before"])
            if len(asked) > room:
                raise HTTPException(
                    HTTPStatus.BAD_REQUEST,
                    f"question: {len(asked)} tokens; at most {room} can be read after a document",
                )
            async with _deleted_meanwhile(engine, library, parts, owner):
                # As it is read where it follows a document.
                params = {"from": heard["anchor"], "save": False}
                await engine.read(heard["before"] + asked, request, params, salt)
        async with _deleted_meanwhile(engine, library, parts, owner):
            words = None
            if library is not None:
                read = functools.partial(_texts_of, engine, owner)
                words = await engine.words.find(owner, library, parts, question, CANDIDATES, read)
            answer = await _answer(
                engine, "found", request=request, top=top, salt=owner, by_words=words, made=made,
                parts=[(part.session, part.tokens) for part in parts],
            )  # fmt: skip
    return parts, answer


async def _texts_of(engine: LolaEngine, owner: str | None, parts: list[KnownPart]) -> list[str]:
    decode = engine.client.renderer.tokenizer.decode  # type: ignore[union-attr]
    read: list[str] = []
    for first in range(0, len(parts), TEXTS_AT_ONCE):
        names = [part.session for part in parts[first : first + TEXTS_AT_ONCE]]
        for ids in await engine.sessions("texts", sessions=names, salt=owner):
            read.append(await asyncio.to_thread(decode, ids, skip_special_tokens=True))
    return read


@asynccontextmanager
async def _question(engine: LolaEngine) -> AsyncIterator[str]:
    """A turn to ask, and the id of the request that is heard in it."""
    request_id = f"{LIBRARY_REQUEST}{uuid.uuid4().hex}"
    async with engine.questions.turn(caller()):
        try:
            yield request_id
        except BaseException:  # a disconnected client cancels this
            engine.later(engine.ask_workers("lola_unhear", request_id))
            raise


async def _answer(engine: LolaEngine, method: str, **asked: Any) -> Answer:
    """What a method of `Questions` answers, once no other question is heard, or it is found."""
    while True:
        answer: Answer = await engine.sessions(method, **asked)
        if answer and not answer.get("busy"):
            return answer
        await asyncio.sleep(POLL_S)


@asynccontextmanager
async def _deleted_meanwhile(
    engine: LolaEngine, library: str | None, parts: list[KnownPart], owner: str | None
) -> AsyncIterator[None]:
    """Say so where a question to a library fails because a part that it reads is gone.

    Raises:
        HTTPException: 409.
    """
    try:
        yield
    except HTTPException as error:
        documents: list[dict[str, Any]] = []
        if library is not None:
            with suppress(HTTPException):  # the library is gone too
                documents = (await engine.sessions("library", library=library, salt=owner))[
                    "documents"
                ]
        there = {part["session"] for one in documents for part in one["parts"]}
        if library is None or {part.session for part in parts} <= there:
            raise
        raise HTTPException(
            HTTPStatus.CONFLICT,
            "a document was deleted or replaced while the question was asked; ask again",
        ) from error


async def source_of(
    engine: LolaEngine, parts: list[KnownPart], choice: Answer, question: str
) -> Answer:
    """A part that was chosen, as `protocol.Source` has it."""
    part = parts[choice["document"]]
    passage = await asyncio.to_thread(
        _passage, engine.client.renderer.tokenizer, choice["tokens"], choice["peaks"], question
    )
    return {
        "document": part.document, "part": part.part, "parts": part.parts,
        "session": part.session, "tokens": part.tokens, "score": choice["score"],
        "share": choice["share"], "sentence": passage.sentence, "passage": passage.text,
    }  # fmt: skip


def _passage(tokenizer: Any, tokens: list[int], peaks: list[int], question: str) -> Passage:
    whole, *read = (
        tokenizer.decode(ids, skip_special_tokens=True)
        for ids in (tokens, *(tokens[:peak] for peak in peaks))
    )
    return passage_of(whole, list(map(len, read)), question)


def with_passages(sources: list[dict[str, Any]]) -> str:
    """What stands before a question to these sources."""
    return before_question([(one["document"], one["passage"]) for one in sources])


def asked_with(messages: list[Any], before: str) -> list[Any]:
    """Messages, the last of which begins with a text."""
    if not before:
        return messages
    *others, last = messages
    content = last["content"]
    if isinstance(content, str):
        return [*others, {**last, "content": f"{before}\n\n{content}"}]
    return [*others, {**last, "content": [{"type": "text", "text": before}, *content]}]


def last_text(messages: list[Any]) -> str:
    """What the last message says.

    Raises:
        HTTPException: no text.
    """
    last = messages[-1] if messages else None
    content = last.get("content") if isinstance(last, dict) else None
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = " ".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str) or not content.strip():
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            "messages: the last one has no text to ask; give 'question', or a text",
        )
    return content
