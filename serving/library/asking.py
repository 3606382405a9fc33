"""What a question reads of a library, and what is composed to answer it."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException

from lola_vllm.memory.documents.choose import CANDIDATES
from lola_vllm.memory.documents.passage import Passage, before_question, passage_of
from lola_vllm.memory.documents.words import fuse
from lola_vllm.memory.sessions.request import LIBRARY_REQUEST
from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.library.adding import most_tokens
from lola_vllm.serving.library.words import KnownPart
from lola_vllm.serving.sessions.composed_start import COMPOSED_TTL
from lola_vllm.serving.sessions.owners import caller, owned

POLL_S = 0.02  # between two looks whether documents were found


# Of a part that has a question's words, and that its heads did not find.
_UNREAD: dict[str, Any] = {"score": 0.0, "share": 0.0, "places": []}


async def find(
    engine: LolaEngine, library: str, question: str, top: int, salt: str | None
) -> list[dict[str, Any]]:
    """The parts that a question reads, the most first, as `protocol.Source` has them.

    Args:
        salt: the caller's.

    Raises:
        HTTPException: there is no such library, or the question is too long, or too many wait.
    """
    engine.questions.check(caller())
    found = await engine.sessions("library", library=library, salt=owned(salt))
    parts = [
        KnownPart(document["document"], part["part"], len(document["parts"]), part["session"],
                  part["id"], part["tokens"])
        for document in found["documents"] for part in document["parts"]
    ]  # fmt: skip

    async def texts(new: list[KnownPart]) -> list[str]:
        ids = [await _tokens(engine, part, salt) for part in new]
        decode = engine.client.renderer.tokenizer.decode  # type: ignore[union-attr]
        return await asyncio.to_thread(
            lambda: [decode(each, skip_special_tokens=True) for each in ids]
        )

    async with deleted_meanwhile(engine, library, {part.session for part in parts}, salt):
        by_heads, by_words = await asyncio.gather(
            choose_among(engine, parts, question, max(top, CANDIDATES), salt),
            engine.words.find(owned(salt), library, parts, question, CANDIDATES, texts),
        )
        read = {choice["document"]: choice for choice in by_heads}
        order = fuse([list(read), by_words])[:top]
        found = [
            await source_of(engine, parts[i], read.get(i, _UNREAD), question, salt) for i in order
        ]
        total = sum(source["score"] for source in found)
        for source in found:
            source["share"] = source["score"] / total if total else 1 / len(found)
        return found


@asynccontextmanager
async def deleted_meanwhile(
    engine: LolaEngine, library: str, sessions: Set[str], salt: str | None
) -> AsyncIterator[None]:
    """Say so where a question fails because a part that it reads is gone.

    Args:
        sessions: of the parts.

    Raises:
        HTTPException: 409.
    """
    try:
        yield
    except HTTPException as error:
        documents: list[dict[str, Any]] = []
        with suppress(HTTPException):  # the library is gone too
            documents = (await engine.sessions("library", library=library, salt=owned(salt)))[
                "documents"
            ]
        if sessions <= {part["session"] for one in documents for part in one["parts"]}:
            raise
        raise HTTPException(
            HTTPStatus.CONFLICT,
            "a document was deleted or replaced while the question was asked; ask again",
        ) from error


async def choose_among(
    engine: LolaEngine,
    parts: list[KnownPart],
    question: str,
    top: int,
    salt: str | None,
    rest: tuple[str, int, int] | None = None,
    newest: int = 0,
) -> list[dict[str, Any]]:
    """What a question reads of parts that are known, the most first, as `Librarian.found` has it.

    Args:
        rest, newest: as `Librarian.find` takes them.
    """
    room = most_tokens(engine)
    asked = await _encoded(engine, f"\n{question.strip()}")
    # A question is read after a document, as it is when it follows one.
    anchor = max(parts, key=lambda part: part.tokens)  # the first of several
    if anchor.tokens + len(asked) > room:
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            f"question: {len(asked)} tokens; at most {room - anchor.tokens} can be read after a "
            "document",
        )
    name = f"question-{uuid.uuid4().hex}"
    async with engine.questions.turn(caller()):
        try:
            async with engine.hearing:
                await _hear(engine, name, anchor, asked, salt)
            states = [(part.id, part.tokens) for part in parts]
            await engine.ask_workers("lola_find", name, states, top, rest, newest)
            answer: dict[str, Any] = {}
            while "choices" not in answer:
                await asyncio.sleep(POLL_S)
                (answer,) = await engine.ask_workers("lola_found", name)
        except BaseException:  # a disconnected client cancels this
            engine.later(engine.ask_workers("lola_unhear", name))
            raise
    choices: list[dict[str, Any]] = answer["choices"]
    return choices


async def compose(
    engine: LolaEngine,
    sources: list[dict[str, Any]],
    room: int,
    salt: str | None,
    session: str | None = None,
    ttl: float | None = None,
) -> str:
    """The session of the parts that a question reads; what is read most comes last, nearest to it.

    Args:
        sources: of `find`; those that there is no room for are removed. room: for tokens.
        session: its name; None: the server's, for parts that are asked again.
        ttl: seconds for which it is kept.
    """
    ends = list(itertools.accumulate(source["tokens"] for source in sources))
    while len(ends) > 1 and ends[-1] > room:
        ends.pop()
        sources.pop()
    names = [source["session"] for source in reversed(sources)]
    given: dict[str, Any] = {"sources": names, "salt": owned(salt)}
    if session is None:
        ttl = COMPOSED_TTL if ttl is None else ttl
        made = await engine.sessions("compose_parts", **given, ttl=ttl)
    else:
        made = await engine.sessions("compose", **given, to=session, ttl=ttl)
    return str(made["session"])


async def _hear(
    engine: LolaEngine, name: str, anchor: KnownPart, tokens: list[int], salt: str | None
) -> None:
    """Read tokens behind a part, and keep their queries under a name."""
    before = await _tokens(engine, anchor, salt)
    prompt, request_id = before + tokens, f"{LIBRARY_REQUEST}{uuid.uuid4().hex}"
    while True:  # another API process of this server may be listening
        (answer,) = await engine.ask_workers(
            "lola_hear", request_id, name, len(before), len(prompt)
        )
        if not answer.get("busy"):
            break
        await asyncio.sleep(POLL_S)
    try:
        await engine.read(prompt, request_id, {"from": anchor.session, "save": False}, salt)
        await engine.ask_workers("lola_heard", request_id)
    except BaseException:
        engine.later(engine.ask_workers("lola_unhear", request_id))
        raise


async def source_of(
    engine: LolaEngine, part: KnownPart, choice: dict[str, Any], question: str, salt: str | None
) -> dict[str, Any]:
    """A part that was chosen, as `protocol.Source` has it."""
    tokens = await _tokens(engine, part, salt)
    passage, places = await asyncio.to_thread(
        _texts, engine.client.renderer.tokenizer, tokens, choice["places"], question
    )
    return {
        "document": part.document, "part": part.part, "parts": part.parts,
        "session": part.session, "tokens": part.tokens, "score": choice["score"],
        "share": choice["share"], "sentence": passage.sentence, "passage": passage.text,
        "places": places,
    }  # fmt: skip


def _texts(
    tokenizer: Any, tokens: list[int], places: list[list[Any]], question: str
) -> tuple[Passage, list[dict[str, Any]]]:
    """The passage for the question, and the texts of places."""

    def decoded(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    shown = [
        {"text": decoded(tokens[first:last]), "share": share} for first, last, share, _ in places
    ]
    read = [len(decoded(tokens[:peak])) for *_, peak in places]
    return passage_of(decoded(tokens), read, question), shown


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


async def _tokens(engine: LolaEngine, part: KnownPart, salt: str | None) -> list[int]:
    said = await engine.sessions("tokens", reference=part.session, salt=owned(salt))
    tokens: list[int] = said["tokens"]
    return tokens


async def _encoded(engine: LolaEngine, text: str) -> list[int]:
    tokenizer: Any = engine.client.renderer.tokenizer
    ids: list[int] = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=False)
    return ids


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
