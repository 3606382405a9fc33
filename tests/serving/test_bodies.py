"""What a body may be is found out before anything walks it, and said in words."""

import asyncio
import json
import time
from unittest.mock import AsyncMock

import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.testclient import TestClient

from lola_vllm.serving.bodies import LolaRoute, _bounded
from lola_vllm.serving.protocol import MAX_BODY_BYTES, MemoryRequest

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client():
    """An app with one route that takes what /v1/lola/memory takes and gives it back."""
    router = APIRouter(route_class=LolaRoute)

    @router.post("/memory")
    async def memory(body: MemoryRequest) -> dict:
        return body.model_dump(exclude_unset=True)

    app = FastAPI()
    app.include_router(router)
    with TestClient(app) as running:
        yield running


def post(client, body):
    content = body if isinstance(body, bytes) else json.dumps(body)
    return client.post("/memory", content=content, headers=JSON)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x"},
        {"prompt": [1] * 65_536, "layers": [0]},
        {"prompt": "字" * 1_000_000},
        {"messages": [{"role": "user", "content": "x", "name": "y"}, {"role": "assistant"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1_000}]},
        {"messages": [{"role": "user", "content": None}], "cache_salt": "s"},
    ],
    ids=["text", "ids", "long", "chat", "parts", "salt"],
)
def test_what_is_within_the_bounds_is_taken_as_it_is(client, body):
    content = json.dumps(body, ensure_ascii=False).encode()
    response = client.post("/memory", content=content, headers=JSON)
    assert response.status_code == 200, response.text
    assert response.json() == body


def words(n, text="user"):
    return [{"role": "user", "content": text}] * n


BAD = {
    "no-prompt": ({}, "give one of 'prompt'", None),
    "both": ({"prompt": "x", "messages": [{"role": "user"}]}, "give one of 'prompt'", None),
    "null": (b"null", "the body: Field required", None),
    "a-list": ([1, 2], "the body = [1, 2]: Input should be", None),
    "broken": (b'{"prompt": ', "the body is no JSON: Expecting value at character 11", None),
    "number": ({"prompt": 5}, "prompt = 5: Input should be text or a list of token ids", "prompt"),
    "fraction": ({"prompt": [1, 1.5]}, "prompt.1 = 1.5: Input should be a valid int", "prompt.1"),
    "name": ({"prompt": "x", "layer": 3}, "layer: unknown field; nearest valid name: 'lay", None),
    "role": ({"messages": [{"name": "x"}]}, "messages.0.role: Field req", "messages.0.role"),
    "content": (
        {"messages": words(1, 5)},
        "messages.0.content = 5: Input should be text or a list of parts",
        "messages.0.content",
    ),
    "characters": ({"messages": words(2, "a" * 600_000)}, "messages: 1200000 characters", None),
    "characters-of-parts": (
        {"messages": words(2, [{"type": "text", "text": "a" * 600_000}])},
        "messages: 1200000 characters; at most 1000000 are read",
        None,
    ),
    "parts": (
        {"messages": words(3, [{"type": "text", "text": "x"}] * 400)},
        "messages: 1200 parts; at most 1000",
        None,
    ),
    "parts-of-one": (
        {"messages": words(1, [{"type": "text", "text": "x"}] * 1_001)},
        "messages.0.content = [{'text': 'x', 'type': 'text'}, ",
        "messages.0.content",
    ),
    "part": (
        {"messages": words(1, ["x"])},
        "messages.0.content.0 = 'x': Input should be a valid dictionary",
        "messages.0.content.0",
    ),
    "part-without-text": (
        {"messages": words(1, [{"type": "text", "text": 5}])},
        "messages.0.content.0.text = 5: Input should be a valid string",
        "messages.0.content.0.text",
    ),
    "half-a-character": (
        {"prompt": "ab\ud800"},
        "prompt: character 2 is half of a surrogate pair",
        None,
    ),
    "half-a-character-of-salt": (
        {"prompt": "x", "cache_salt": "\ud800"},
        "cache_salt: character 0 is half of a surrogate pair",
        "cache_salt",
    ),
    "calls": (
        {"messages": [{"role": "assistant", "tool_calls": [{}] * 1_001}]},
        "messages: 1001 parts; at most 1000",
        None,
    ),
    "ids": ({"prompt": [1] * 65_537}, "prompt = [1, 1, 1, 1, 1, 1, ...]: List should", "prompt"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "said", "field"), BAD.values(), ids=BAD)
def test_refusals_name_field_value_and_remedy(client, body, said, field):
    response = post(client, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith(said)
    assert error["param"] == field
    assert len(error["message"]) < 300
    assert "'loc'" not in error["message"] and "[type=" not in error["message"]  # of pydantic


def test_a_body_of_too_many_bytes_is_not_read(client):
    whole = b" " * (MAX_BODY_BYTES + 1)
    for content in (whole, iter([whole])):  # of a length that is said, and not
        response = client.post("/memory", content=content, headers=JSON)
        assert response.status_code == 413
        assert f"more than {MAX_BODY_BYTES} bytes" in response.json()["detail"]
    assert post(client, b" " * (MAX_BODY_BYTES - 15) + b'{"prompt": "x"}').status_code == 200


def test_the_pieces_of_a_body_are_bounded_together():
    """A test client sends a body in one piece, servers as it comes."""
    receive = _bounded(AsyncMock(return_value={"body": b" " * (MAX_BODY_BYTES // 2)}))
    asyncio.run(receive())
    asyncio.run(receive())
    with pytest.raises(HTTPException, match="413"):
        asyncio.run(receive())


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b'"x",' * 1_000_000 + b"1]}",
        b'{"prompt": [' + b"12," * 1_300_000 + b"1]}",
        b'{"layers": [' + b'"x",' * 1_000_000 + b'1], "prompt": "x"}',
        b'{"messages": [' + b"1," * 2_000_000 + b"1]}",
        b'{"messages": [{"role": "user", "content": [' + b'{"type":0},' * 350_000 + b"1]}]}",
        b"{" + b",".join(b'"%d":0' % i for i in range(350_000)) + b"}",
    ],
    ids=["no-ids", "ids", "layers", "no-messages", "parts", "fields"],
)
def test_lists_as_long_as_a_body_may_have_do_not_hold_up_others(client, body):
    """Checking each item, and keeping a record of each fault, takes seconds."""
    assert len(body) < MAX_BODY_BYTES
    begin = time.thread_time()
    json.loads(body)
    parsing = time.thread_time() - begin
    with pytest.raises(Exception) as refused:
        begin = time.thread_time()
        MemoryRequest(**json.loads(body))
    assert time.thread_time() - begin < 3 * parsing + 0.2
    assert len(str(refused.value)) < 2_000
    assert post(client, body).status_code == 400
