"""A question to a library of which a document is deleted meanwhile."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException

from lola_vllm.serving.library import asking

PART = {"part": 1, "session": "library-1", "id": "1" * 32, "tokens": 40}


@pytest.mark.parametrize("status", [HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE])
@pytest.mark.parametrize("deleted", ["nothing", "a document", "the library"])
def test_it_is_told_that_a_document_is_gone(
    monkeypatch: pytest.MonkeyPatch, status: HTTPStatus, deleted: str
) -> None:
    """Whatever notices first; what fails for another reason is told as it is."""
    documents: list[Any] = [{"document": "a.md", "parts": [PART]}]

    async def sessions(method: str, **arguments: Any) -> Any:
        assert (method, arguments["library"]) == ("library", "pumps")
        if documents is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "there is no library 'pumps'")
        return {"documents": documents}

    async def choose(*_: Any) -> Any:
        nonlocal documents
        if deleted != "nothing":
            documents = [] if deleted == "a document" else None  # type: ignore[assignment]
        raise HTTPException(status, "something is missing")

    async def words(*_: Any) -> list[int]:
        return []

    monkeypatch.setattr(asking, "choose_among", choose)
    engine: Any = SimpleNamespace(
        sessions=sessions,
        questions=SimpleNamespace(check=lambda _: None),
        words=SimpleNamespace(find=words),
    )
    with pytest.raises(HTTPException) as refused:
        asyncio.run(asking.find(engine, "pumps", "When?", 3, None))
    if deleted == "nothing":
        assert refused.value.status_code == status
    else:
        assert refused.value.status_code == HTTPStatus.CONFLICT
        assert "deleted or replaced" in refused.value.detail
