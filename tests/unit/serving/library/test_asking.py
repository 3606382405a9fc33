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
