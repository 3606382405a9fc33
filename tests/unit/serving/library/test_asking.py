"""A question to a library of which a document is deleted meanwhile."""

import asyncio
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException

from lola_vllm.serving.library import asking
from lola_vllm.serving.library.turns import Turns

PART = {"part": 1, "session": "library-1", "id": "1" * 32, "tokens": 40}
HEARD = {
    "parts": [["a.md", 1, 1, *list(PART.values())[1:]]], "anchor": "library-1", "before": [5] * 40
}  # fmt: skip


async def asked(engine: Any) -> None:
    try:
        await asking.find(engine, "pumps", "When?", 3, None)
    finally:
        await asyncio.sleep(0)  # what is done later


@pytest.mark.parametrize("status", [HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE])
@pytest.mark.parametrize("deleted", ["nothing", "a document", "the library"])
def test_it_is_told_that_a_document_is_gone(monkeypatch, status, deleted):
    """Whatever notices first; what fails for another reason is told as it is."""
    documents: list[Any] | None = [{"document": "a.md", "parts": [PART]}]

    async def sessions(method: str, **arguments: Any) -> Any:
        nonlocal documents
        if method == "hear":
            return HEARD
        if method == "found":
            if deleted != "nothing":
                documents = [] if deleted == "a document" else None
            raise HTTPException(status, "something is missing")
        assert (method, arguments["library"]) == ("library", "pumps")
        if documents is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "there is no library 'pumps'")
        return {"documents": documents}

    async def workers(method: str, *_: Any) -> None:
        forgotten.append(method)

    async def nothing(*_: Any) -> list[int]:
        return []

    forgotten: list[str] = []
    tokenizer = SimpleNamespace(encode=lambda *_, **__: [])
    monkeypatch.setattr(asking, "most_tokens", lambda _: 100)
    engine: Any = SimpleNamespace(
        sessions=sessions, ask_workers=workers, read=nothing, later=asyncio.ensure_future,
        hearing=asyncio.Lock(), questions=Turns(), words=SimpleNamespace(find=nothing),
        client=SimpleNamespace(renderer=SimpleNamespace(tokenizer=tokenizer)),
    )  # fmt: skip
    with pytest.raises(HTTPException) as refused:
        asyncio.run(asked(engine))
    if deleted == "nothing":
        assert refused.value.status_code == status
    else:
        assert refused.value.status_code == HTTPStatus.CONFLICT
        assert "deleted or replaced" in refused.value.detail
    assert forgotten == ["lola_unhear"]


def test_a_question_crosses_to_the_engine_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a fourth time with its answer, which goes on from what was made."""
    calls: list[str] = []
    text = "It starts at two. The pump stands in hall 2."
    made = {"session": None, "ttl": None}
    transcript = {
        "session": PART["session"],
        "turn": 1,
        "kind": "prompt",
        "tokens": [5],
        "tail": [],
    }

    async def sessions(method: str, **arguments: Any) -> Any:
        calls.append(method)
        if method == "hear":
            return HEARD
        assert arguments["made"] == made and arguments["by_words"] == [(0, 1.5)]
        choice = {"document": 0, "score": 2.0, "share": 0.5, "peaks": [3]}
        return {"found": [{**choice, "tokens": [5] * 40}], "transcript": transcript}

    async def read(*_: Any) -> None:
        calls.append("read")

    async def words(*_: Any) -> list[tuple[int, float]]:
        return [(0, 1.5)]

    tokenizer = SimpleNamespace(encode=lambda *_, **__: [7], decode=lambda *_, **__: text)
    monkeypatch.setattr(asking, "most_tokens", lambda _: 100)
    engine: Any = SimpleNamespace(
        sessions=sessions, read=read, hearing=asyncio.Lock(), questions=Turns(),
        words=SimpleNamespace(find=words),
        client=SimpleNamespace(renderer=SimpleNamespace(tokenizer=tokenizer)),
    )  # fmt: skip
    sources, said = asyncio.run(asking.find(engine, "pumps", "Where?", 3, None, made))
    assert calls == ["hear", "read", "found"] and said == transcript
    assert [(one["document"], one["share"]) for one in sources] == [("a.md", 1.0)]
    assert sources[0]["passage"]
