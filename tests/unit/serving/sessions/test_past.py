"""Whether a segment of a session's own text comes back, and what is asked of it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from lola_vllm.memory.documents.past import OWN
from lola_vllm.serving.sessions import past
from lola_vllm.serving.sessions.template_boundary import Transcript

SIZE, LENGTH = 64, 3 * 64 + 10
SESSION = Transcript(7, "answer", list(range(LENGTH)), [901, 902])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that has three segments of the session; `order` is what it was asked to compose, and
    `newest` what may be found besides them."""
    engine = SimpleNamespace(
        config=SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096)), order=None
    )

    async def sessions(method: str, **arguments: Any) -> Any:
        assert (method, arguments["reference"]) == ("past", "s@7")
        segments = [{"segment": i, "session": f"part-{i}", "id": f"id-{i}"} for i in range(3)]
        return {"segments": segments, "id": "now", "tokens": LENGTH}

    async def choose(_engine: Any, _parts: Any, before: Any, *_: Any, **newer: Any) -> Any:
        assert before == SESSION.tokens[:SIZE]
        engine.newest = newer
        return engine.choices

    async def source(_engine: Any, parts: Any, choice: dict[str, Any], question: str) -> Any:
        assert question == "Which?"
        part = parts[choice["document"]]
        return {"session": part.session, "part": part.part, "score": choice["score"],
                "sentence": "It is blue."}  # fmt: skip

    async def compose(_engine: Any, sources: list[str], _salt: Any) -> Any:
        engine.order = sources
        tokens = {"s@7": SESSION.tokens, "part-1": list(range(SIZE, 2 * SIZE))}
        text = [token for name in sources for token in tokens[name]]
        return "composed", {"turn": 1, "kind": "prompt", "tokens": text, "tail": []}

    engine.sessions = sessions
    monkeypatch.setattr(past, "check_libraries", lambda _: None)
    monkeypatch.setattr(past, "segment_tokens", lambda _: SIZE)
    for name, stand_in in (
        ("choose_among", choose), ("source_of", source), ("compose_for_request", compose),
    ):  # fmt: skip
        monkeypatch.setattr(past, name, stand_in)
    return engine


def recall(engine: Any, *read: tuple[int, float, float]) -> past.Recalled | None:
    engine.choices = [dict(zip(("document", "score", "own"), one, strict=True)) for one in read]
    return asyncio.run(past.recall(engine, "s", SESSION, "Which?", None))


def test_a_segment_stands_next_to_the_question_though_newer_text_is_read_more(engine: Any) -> None:
    found = recall(engine, (3, 9.0, 1.0), (1, 8.0, OWN), (0, 7.0, 0.1))
    assert engine.order == ["s@7", "part-1"] and engine.newest == {
        "rest": ("now", LENGTH, 10), "newest": 2
    }  # fmt: skip
    assert found is not None
    said = found.said["recalled"]
    assert (said["first"], said["last"]) == (SIZE, 2 * SIZE)
    assert found.sources == [] and found.before == ""
    # It ends in the middle of a text, and no answer is before the question.
    tokens = SESSION.tokens + list(range(SIZE, 2 * SIZE))
    assert found.transcript == Transcript(1, "prompt", tokens, [])


@pytest.mark.parametrize(
    "read", [[(1, 8.0, OWN / 2), (2, 7.0, 1.0)], [(3, 8.0, 1.0), (1, 2.0, 1.0)]]
)
def test_the_session_is_asked_alone_where_newer_text_has_what_is_asked(
    engine: Any, read: list[tuple[int, float, float]]
) -> None:
    assert recall(engine, *read) is None and engine.order is None
