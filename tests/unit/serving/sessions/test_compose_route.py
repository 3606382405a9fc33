"""The route that makes a session of others, over a store without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient

from lola_vllm.memory.sessions.prefix_hash import salt_hash
from lola_vllm.serving.engine import SESSION_STATUS
from lola_vllm.serving.sessions.management import router
from tests.support.sessions import Server


class Engine:
    """A server's engine that has a store and nothing else."""

    def __init__(self, caching: bool = False) -> None:
        self.server = Server()
        cache = SimpleNamespace(enable_prefix_caching=caching)
        self.config = SimpleNamespace(cache_config=cache)

    async def store_id(self) -> str:
        return self.server.store.id

    async def sessions(self, method: str, **arguments: Any) -> Any:
        answer = self.server.ask(method, **arguments)
        if isinstance(answer, dict) and "error" in answer:
            raise HTTPException(SESSION_STATUS[answer["kind"]], answer["error"])
        return answer


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    engine.server.say(list(range(100, 130)), "one")
    engine.server.say(list(range(500, 541)), "two")
    engine.server.say(list(range(40)), "hers", salt=salt_hash("alice"))
    yield engine
    engine.server.close()


def client(engine: Engine) -> TestClient:
    app = FastAPI()
    app.include_router(router)
    app.state.lola_engine = engine
    return TestClient(app, base_url="http://test/v1/lola/sessions/")


def test_a_session_is_made_and_remembers_of_what(engine: Engine) -> None:
    asked = client(engine)
    made = asked.post("both/compose", json={"from": ["one", "two@1"], "ttl": 60})
    assert made.status_code == 200, made.text
    detail = made.json()
    assert (detail["made_of"], detail["tokens"]) == (["one@1", "two@1"], 24 + 41)
    assert detail["states"][0]["expires"] == pytest.approx(detail["created"] + 60)
    assert asked.get("both").json()["made_of"] == ["one@1", "two@1"]
    assert asked.get("one").json()["made_of"] == []
    assert len(asked.get("both/tokens").json()["tokens"]) == 24 + 41
    assert asked.delete("one").json() == {"deleted": 1, "composed": ["both"]}
    assert asked.delete("two@1").json()["composed"] == ["both"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"from": ["one", "gone"]}, 404),
        ({"from": ["one", "hers"]}, 404),
        ({"from": []}, 400),
        ({"from": ["one"] * 65}, 400),
        ({"from": ["a b"]}, 400),
        ({"from": "one"}, 400),
        ({"from": ["one"], "ttl": 0}, 400),
        ({"from": ["one"], "to": "x"}, 400),
        ({}, 400),
    ],
)
def test_what_cannot_be_made_is_refused(engine: Engine, body: Any, status: int) -> None:
    answer = client(engine).post("both/compose", json=body)
    assert answer.status_code == status, answer.text
    assert "both" not in {name for _, name in engine.server.store.sessions}


def test_a_name_that_is_taken_and_a_prefix_cache_are_refused(engine: Engine) -> None:
    answer = client(engine).post("two/compose", json={"from": ["one"]})
    assert answer.status_code == 409
    engine.config.cache_config.enable_prefix_caching = True
    answer = client(engine).post("both/compose", json={"from": ["one"]})
    assert answer.status_code == 501 and "prefix caching" in answer.text
