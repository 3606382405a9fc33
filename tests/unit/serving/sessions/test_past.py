"""Whether a segment of a session's own text comes back, and what is asked of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response

from lola_vllm.serving.sessions import generate, past
from lola_vllm.serving.sessions.past import OUTDOES, OWN
from lola_vllm.serving.sessions.template_boundary import Transcript

SIZE, LENGTH = 64, 3 * 64 + 10
SESSION = Transcript(7, "answer", list(range(LENGTH)), [901, 902])


@pytest.fixture
def engine(monkeypatch):
    """One that has three segments of the session; `order` is what it was asked to compose, and
    `newest` what may be found besides them."""
    engine = SimpleNamespace(
        config=SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096)), order=None
    )

    async def sessions(method: str, **arguments: Any) -> Any:
        if method == "compose_parts":
            engine.order = arguments["sources"]
            tokens = {"s@7": SESSION.tokens, "part-1": list(range(SIZE, 2 * SIZE))}
            text = [token for name in engine.order for token in tokens[name]]
            return {"session": "made", "turn": 1, "kind": "prompt", "tokens": text, "tail": []}
        assert (method, arguments["reference"]) == ("past", "s@7")
        segments = [{"segment": i, "session": f"part-{i}", "id": f"id-{i}"} for i in range(3)]
        return {"segments": segments, "id": "now", "tokens": LENGTH}

    async def ask(_engine: Any, *_: Any, segments: dict[str, Any]) -> Any:
        assert [part[3:] for part in segments.pop("parts")] == [
            [f"part-{i}", f"id-{i}", SIZE] for i in range(3)
        ]
        engine.newest = segments
        return None, {"found": engine.choices}

    async def source(_engine: Any, parts: Any, choice: dict[str, Any], question: str) -> Any:
        assert question == "Which?"
        part = parts[choice["document"]]
        return {"session": part.session, "part": part.part, "score": choice["score"],
                "sentence": "It is blue."}  # fmt: skip

    engine.sessions = sessions
    monkeypatch.setattr(past, "check_libraries", lambda _: None)
    monkeypatch.setattr(past, "segment_tokens", lambda _: SIZE)
    monkeypatch.setattr(past, "ask_parts", ask)
    monkeypatch.setattr(past, "source_of", source)
    return engine


def recall(engine: Any, *read: tuple[int, float, float]) -> past.Recalled | None:
    engine.choices = [dict(zip(("document", "score", "own"), one, strict=True)) for one in read]
    return asyncio.run(past.recall(engine, "s", SESSION, "Which?", None))


def test_a_segment_stands_next_to_the_question_though_newer_text_is_read_more(engine):
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
def test_the_session_is_asked_alone_where_newer_text_has_what_is_asked(engine, read):
    assert recall(engine, *read) is None and engine.order is None


@pytest.mark.parametrize(
    ("found", "index"),
    [
        ([(2, 8.0, OWN), (1, 7.9, 1.0), (5, 1.9, 1.0)], 0),
        ([(2, 8.0, OWN / 2), (5, 4.0, 1.0)], None),  # newer text has the same
        ([(5, 8.0, 1.0), (1, 7.0, OWN)], 1),  # it has more, and not the same
        ([(5, 8.0, 1.0), (1, 7.0, OWN / 2)], None),
        ([(5, 8.0, 1.0), (1, 8.0 / OUTDOES, 1.0)], None),  # it has most by far
        ([(4, 8.0, 1.0), (1, 8.0 / OUTDOES, 1.0)], 0),  # the last segment does, and comes back
        ([(5, 8.0, 1.0), (4, 7.9, OWN / 2), (1, 0.5, 1.0)], None),
        ([(3, 8.0, 1.0), (2, 7.9, OWN / 2)], 0),
        ([(0, 0.0, 1.0), (1, 0.0, 1.0)], None),  # nothing has anything
    ],
)
def test_a_segment_comes_back_where_newer_text_has_not_the_same(found, index):
    names = ("document", "score", "own")
    choices = [dict(zip(names, one, strict=True)) for one in found]
    assert past.comes_back(choices, 5) == (None if index is None else choices[index])


@pytest.mark.parametrize("answer", ["whole", "stream", "refused", "broken"])
def test_what_was_composed_for_an_answer_is_deleted_at_its_end(engine, monkeypatch, answer):
    deleted: list[str] = []

    async def sessions(method: str, reference: str, salt: str | None) -> None:
        assert (method, salt) == ("delete", None)
        deleted.append(reference)

    async def events() -> AsyncIterator[str]:
        assert not deleted
        yield "data: [DONE]\n\n"

    async def reply(_tokens: Any, params: dict[str, Any]) -> Response:
        assert params == {"from": "composed", "save": False} and not deleted
        if answer == "broken":
            raise ValueError("the engine is gone")
        if answer == "stream":
            return StreamingResponse(events())
        return JSONResponse({}, 200 if answer == "whole" else 400)

    def given(value: Any) -> Any:
        async def give(*_: Any) -> Any:
            return value

        return give

    recalled = past.Recalled("composed", SESSION, {"first": 0}, [], "")
    engine.sessions, engine.store_id = sessions, given(f"past-{answer}")
    tasks: list[asyncio.Task[Any]] = []
    engine.later = lambda work: tasks.append(asyncio.ensure_future(work))
    monkeypatch.setattr(generate, "engine_of", lambda _: engine)
    monkeypatch.setattr(generate, "check_length", lambda *_: None)
    monkeypatch.setattr(generate, "_transcript", given(SESSION))
    monkeypatch.setattr(generate, "_recalled", given(recalled))
    monkeypatch.setattr(generate, "_read_on", given(None))
    how: Any = SimpleNamespace(prompt=given([1]), generate=reply, kind="text_completion")

    async def request() -> None:
        body: Any = SimpleNamespace(cache_salt=None, ttl=None)
        with suppress(ValueError):
            found = await generate._answer("s", None, body, how)  # type: ignore[arg-type]
            if answer == "stream":
                assert not tasks
                await found({"type": "http", "asgi": {"spec_version": "2.4"}}, given(None),
                            given(None))  # fmt: skip
        await asyncio.gather(*tasks)

    asyncio.run(request())
    assert deleted == ["composed"]
