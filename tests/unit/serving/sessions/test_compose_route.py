"""What the route that makes a session of others takes, and what it asks of the store."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lola_vllm.memory.sessions.names import Reference
from lola_vllm.serving.sessions import management
from lola_vllm.serving.sessions.protocol import ComposeRequest


def test_sources_and_time_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    async def ask(_request: Any, method: str, _salt: Any, **arguments: Any) -> None:
        asked.update(arguments, method=method)

    monkeypatch.setattr(management, "ask", ask)
    monkeypatch.setattr(management, "engine_of", lambda _: None)
    monkeypatch.setattr(management, "check_composing", lambda _: None)
    body = ComposeRequest.model_validate({"from": ["one", "two@2"] * 32, "ttl": 60})
    asyncio.run(management.compose("both", body, None))  # type: ignore[arg-type]
    assert asked == {
        "method": "compose", "writes": Reference("both"), "sources": ["one", "two@2"] * 32,
        "to": "both", "ttl": 60,
    }  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        {}, {"from": []}, {"from": ["one"] * 65}, {"from": ["a b"]}, {"from": "one"},
        {"from": ["one"], "ttl": 0}, {"from": ["one"], "to": "x"},
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(body: Any) -> None:
    with pytest.raises(ValueError):
        ComposeRequest.model_validate(body)
