"""Requests that nobody meant to send: every answer is 2xx or 4xx, and the engine goes on.

They are made by schemathesis from the server's own OpenAPI description, valid and not. The server
is a real one, of a tiny model.
"""

from random import Random
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode

from tests.support.effort import cases
from tools.support.server_process import Server

NAME = "tiny"
KNOWN = {
    "model": NAME, "prompt": "the hidden state", "max_tokens": 8, "temperature": 0,
    "ignore_eos": True,
}  # fmt: skip
FEW = 6  # tokens that a random request gets at most: what is tested is not how long one waits
CHAT = [{"role": "user", "content": "What is a window?"}]
SESSION = "/v1/lola/sessions/{session}"
GOOD: dict[str, dict[str, Any]] = {
    "/v1/lola/memory": {"prompt": "the hidden state"},
    "/v1/completions": {"model": NAME, "prompt": "the hidden state", "max_tokens": FEW},
    "/v1/chat/completions": {"model": NAME, "messages": CHAT, "max_tokens": FEW},
    "/tokenize": {"model": NAME, "prompt": "the hidden state"},
    "/detokenize": {"model": NAME, "tokens": [5, 6, 7]},
    f"{SESSION}/append": {"prompt": "the hidden state"},
    f"{SESSION}/complete": {"prompt": "the hidden state", "max_tokens": FEW},
    f"{SESSION}/chat": {"messages": CHAT, "max_tokens": FEW},
    f"{SESSION}/fork": {"to": "b"},
    SESSION: {"session": "b"},
}
ROUTES = [
    ("POST", "/v1/lola/memory"),
    ("GET", "/v1/lola/info"),
    ("GET", "/lola/inspector"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/lola/sessions"),
    *(("POST", f"{SESSION}/{verb}") for verb in ("append", "complete", "chat", "fork")),
    *(("GET", f"{SESSION}{part}") for part in ("", "/tokens", "/state")),
    ("PATCH", SESSION),
    ("PUT", f"{SESSION}/state"),
    ("DELETE", SESSION),
]
NAMES = ["a", "b", "a@1", "b@1", "a@999"]  # of sessions, so that some are there


@pytest.fixture(scope="module")
def known(keyless):
    """The answer to a request that all others must leave as it is."""
    return answer(keyless)


def answer(server: Server) -> str:
    response = server.client.post("/v1/completions", json=KNOWN)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


@pytest.fixture
def unharmed(keyless, known):
    """The server; after the test it answers as before and holds no state."""
    yield keyless
    assert keyless.process.poll() is None, keyless.log.read_text()[-4000:]
    assert answer(keyless) == known
    for _ in range(100):
        if keyless.client.get("/v1/lola/info").json()["states"]["used"] == 0:
            return
        httpx.get(f"{keyless.url}/health", timeout=5)
    raise AssertionError("states are in use though nobody asks for anything")


def check(response: httpx.Response, sent: object, waits: bool = False) -> None:
    status = response.status_code
    fine = 200 <= status < 300 or 400 <= status < 500
    # A state that is in memory only has no file.
    fine = fine or (status == 503 and waits)
    assert fine, (status, response.text[:500], str(sent)[:1500])


def tempered(path: str, body: Any, base: dict[str, Any] | None, fields: Random) -> Any:
    """A random body, or a good one with some of its fields, which gets further; few tokens each."""
    if not isinstance(body, dict):
        return body
    if base:
        names = sorted(body)
        kept = fields.sample(names, min(len(names), fields.randint(1, 3)))
        body = base | {name: body[name] for name in kept}
    if path.startswith("/v1/c") and not isinstance(body.get("structured_outputs", {}), dict):
        del body["structured_outputs"]  # vLLM 0.32's own routes answer it with 500
    limits = {"max_tokens": 2048, "max_completion_tokens": 2048, "n": 64, "min_tokens": 2048}
    few = {
        name: FEW
        for name, limit in limits.items()
        if isinstance(value := body.get(name), int) and FEW < value <= limit
    }
    return body | few


def operation(server: Server, method: str, path: str) -> Any:
    description = server.client.get("/openapi.json").json()
    return schemathesis.openapi.from_dict(description)[path][method]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_random_requests(unharmed, method, path, mode):
    """As the description says, and as it does not."""
    found = operation(unharmed, method, path)
    if mode == GenerationMode.NEGATIVE and (not found.body or method == "PUT"):  # any bytes
        pytest.skip("takes nothing that could be wrong")
    strategy = found.as_strategy(generation_mode=mode)

    @cases(short=12, long=400)
    @given(case=strategy, good=st.booleans(), fields=st.randoms(use_true_random=False))
    def run(case: Case, good: bool, fields: Random) -> None:
        case.body = tempered(path, case.body, GOOD.get(path) if good else None, fields)
        if good and "{session}" in path:
            case.path_parameters["session"] = fields.choice(NAMES)
        sent = case.as_transport_kwargs(base_url=unharmed.url)
        response = case.call(base_url=unharmed.url, timeout=120)
        check(response, sent, waits="{session}" in path)

    run()
