"""The addresses that a server gives for its pages can be opened on its own machine."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lola_vllm.serving.plugin import LolaEndpoints, describe_pages
from lola_vllm.serving.routes import page

PAGE = "/lola/inspector"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, f"http://127.0.0.1:8000{PAGE}"),
        ({"host": "0.0.0.0", "port": 80}, f"http://127.0.0.1:80{PAGE}"),
        ({"host": "10.0.0.7"}, f"http://10.0.0.7:8000{PAGE}"),
        ({"host": "fd00::1"}, f"http://[fd00::1]:8000{PAGE}"),
        ({"ssl_certfile": "cert.pem"}, f"https://127.0.0.1:8000{PAGE}"),
        ({"root_path": "/proxy"}, f"http://127.0.0.1:8000/proxy{PAGE}"),
        ({"uds": "/tmp/socket"}, "/tmp/socket"),
        ({"api_key": ["SECRET"]}, f"http://127.0.0.1:8000{PAGE} (asks for the API key)"),
        ({"environment": "SECRET"}, f"http://127.0.0.1:8000{PAGE} (asks for the API key)"),
    ],
)
def test_address(given, words, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", given.get("environment", ""))
    args = {"host": None, "port": 8000, "uds": None, "ssl_certfile": None, "api_key": None,
            "root_path": None} | given  # fmt: skip
    line = describe_pages(Namespace(**args))
    assert words in line and "SECRET" not in line
    assert "uds" in given or f"chat: {words.split(PAGE)[0]}/, memory inspector: {words}" in line


@pytest.mark.parametrize(("is_lola", "status"), [(True, 200), (False, 404)])
def test_the_chat_is_at_the_root_of_lola_models_only(is_lola, status):
    app = FastAPI()
    app.include_router(page)
    app.state.lola_engine = SimpleNamespace(is_lola=is_lola)
    answer = TestClient(app).get("/")
    assert answer.status_code == status and ("<html" in answer.text) == is_lola


def test_what_is_not_read_is_said_at_the_end_of_the_start(caplog):
    async def sessions(method):
        assert method == "stats"
        return {"unread": ["3 states are not read in /states: not encrypted"]}

    app = FastAPI()
    LolaEndpoints().attach_router(app)
    app.state.lola_engine = SimpleNamespace(is_lola=True, sessions=sessions)
    app.state.lola_pages = "LoLA: chat: http://127.0.0.1:8000/"
    with caplog.at_level("INFO", "vllm.lola"), TestClient(app):
        lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        app.state.lola_pages,
        "LoLA sessions: 3 states are not read in /states: not encrypted",
    ]
