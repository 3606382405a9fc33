"""What a server without a store, or without leave to take states, says to each route."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.plugin import ROUTERS
from lola_vllm.serving.sessions.management import UPLOAD

BASE = "/v1/lola/sessions"
CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def client():
    """The routes, over an engine of a LoLA model whose server stores no states."""
    engine = LolaEngine.__new__(LolaEngine)
    engine.is_lola = True
    engine.config = SimpleNamespace(kv_transfer_config=None)
    engine._store_id = "of-these-tests"
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    app.state.lola_engine = engine
    with TestClient(app) as running:
        yield running


ROUTES = {
    "list": ("GET", "", None),
    "show": ("GET", "/a", None),
    "tokens": ("GET", "/a@3/tokens", None),
    "state": ("GET", "/a/state", None),
    "change": ("PATCH", "/a", {"session": "b"}),
    "delete": ("DELETE", "/a", None),
    "fork": ("POST", "/a/fork", {"to": "b"}),
    "append": ("POST", "/a/append", {"prompt": "x"}),
    "complete": ("POST", "/a/complete", {"prompt": "x"}),
    "chat": ("POST", "/a/chat", CHAT),
}


@pytest.mark.parametrize(("method", "path", "body"), ROUTES.values(), ids=ROUTES)
def test_without_a_store(client, method, path, body):
    answer = client.request(method, BASE + path, json=body)
    assert answer.status_code == 501, answer.text
    assert "start it with lola-vllm serve" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["complete", "chat"])
@pytest.mark.parametrize("value", [[], "x", 3, True], ids=str)
def test_structured_outputs_that_are_no_object(client, path, value):
    body = ROUTES[path][2] | {"structured_outputs": value}
    answer = client.post(f"{BASE}/a/{path}", json=body)
    assert answer.status_code == 400, answer.text
    assert "structured_outputs = " in answer.text and "must be an object" in answer.text


@pytest.mark.parametrize("allowed", [None, "0", "1"])
def test_states_are_taken_where_the_operator_allows_it(client, monkeypatch, allowed):
    monkeypatch.delenv(UPLOAD, raising=False)
    if allowed is not None:
        monkeypatch.setenv(UPLOAD, allowed)
    answer = client.put(f"{BASE}/a/state", content=b"x")
    assert answer.status_code == (501 if allowed == "1" else 403), answer.text
    assert allowed == "1" or f"{UPLOAD}=1" in answer.json()["detail"]


HOLD = """
import asyncio, sys
from types import SimpleNamespace
from lola_vllm.serving.sessions.management import lock_session
from lola_vllm.memory.sessions.names import Reference

async def store_id():
    return "of-these-tests"

async def main():
    with await lock_session(SimpleNamespace(store_id=store_id), Reference("busy"), None):
        print("held", flush=True)
        sys.stdin.read()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def held():
    """Another API process of the server, which writes the session "busy"."""
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("name", ["append", "complete", "chat", "delete", "change"])
def test_a_session_that_is_being_written(client, held, name):
    method, path, body = ROUTES[name]
    answer = client.request(method, BASE + path.replace("/a", "/busy", 1), json=body)
    assert answer.status_code == 409, answer.text
    assert "'busy' is being written" in answer.json()["detail"]


def test_a_session_whose_process_was_killed(client, held):
    held.kill()
    held.wait()
    assert client.delete(f"{BASE}/busy").status_code == 501


def test_a_refused_request_gives_the_session_back(client):
    for _ in range(2):
        assert client.post(f"{BASE}/a/chat", json=CHAT).status_code == 501
