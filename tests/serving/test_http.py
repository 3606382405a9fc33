"""The OpenAI-compatible API of `vllm serve <LoLA model>`, with no flag that LoLA would need."""

import asyncio
import json
import re

import httpx
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def complete(server, **fields):
    body = {"model": "smollm2", "prompt": "Gravity is", "max_tokens": 12, "temperature": 0}
    return server.client.post("/v1/completions", json={**body, **fields})


def test_completions(server):
    response = complete(server)
    assert response.status_code == 200
    choice = response.json()["choices"][0]
    assert "fundamental" in choice["text"]
    assert choice["finish_reason"] == "length"
    assert response.json()["usage"]["completion_tokens"] == 12


def test_chat_plain_and_streamed(server):
    body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 16, "temperature": 0}
    plain = server.client.post("/v1/chat/completions", json=body)
    assert plain.status_code == 200
    text = plain.json()["choices"][0]["message"]["content"]
    assert "Paris" in text
    streamed = ""
    with server.client.stream(
        "POST", "/v1/chat/completions", json={**body, "stream": True}
    ) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                streamed += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    assert streamed == text


def test_requests_without_sampling_fields_get_those_of_the_model(server, lola_server):
    """With vLLM's own defaults about half of the answers of this model name the city."""
    body = {"messages": QUESTION, "max_tokens": 16}
    response = server.client.post(
        "/v1/chat/completions", json={"model": "smollm2", **body, "n": 5}
    ).json()
    answers = [choice["message"]["content"] for choice in response["choices"]]
    for seed in range(5):
        path = f"/v1/lola/sessions/paris-{seed}/chat"
        said = lola_server.client.post(path, json={**body, "seed": seed}).json()
        answers.append(said["choices"][0]["message"]["content"])
    assert len(answers) == 10 and all("Paris" in answer for answer in answers), answers


def test_sixteen_at_once_answer_as_they_would_alone(server):
    # Prompts whose next tokens are certain: near ties may turn with the size of a batch.
    prompts = [f"Count: {i}, {i + 1}, {i + 2}, {i + 3}, {i + 4}," for i in range(1, 17)]
    alone = [complete(server, prompt=p, max_tokens=6).json()["choices"][0]["text"] for p in prompts]

    async def together():
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            bodies = [
                {"model": "smollm2", "prompt": p, "max_tokens": 6, "temperature": 0}
                for p in prompts
            ]
            return await asyncio.gather(*(client.post("/v1/completions", json=b) for b in bodies))

    responses = asyncio.run(together())
    assert [r.status_code for r in responses] == [200] * 16
    assert [r.json()["choices"][0]["text"] for r in responses] == alone


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "word " * 3000}, "2048"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"model": "another"}, "another"),
    ],
    ids=["too-long", "negative", "unknown-model"],
)
def test_bad_requests_are_refused_and_the_server_goes_on(server, fields, words):
    response = complete(server, **fields)
    assert 400 <= response.status_code < 500, response.text
    assert words in response.text
    assert complete(server).status_code == 200


def test_broken_json_is_refused_and_the_server_goes_on(server):
    headers = {"Content-Type": "application/json"}
    response = server.client.post("/v1/completions", content=b'{"model": ', headers=headers)
    assert 400 <= response.status_code < 500
    assert "json" in response.text.lower()
    assert complete(server).status_code == 200


def test_a_client_that_leaves_disturbs_nobody(server):
    body = {"model": "smollm2", "prompt": "Once", "max_tokens": 500, "stream": True}
    for _ in range(4):
        with server.client.stream("POST", "/v1/completions", json=body) as lines:
            next(lines.iter_lines())
    assert complete(server).status_code == 200


def test_start_up_says_what_a_sequence_costs(server):
    line = re.search(
        r"LoLA: ([\d.]+) MiB per sequence whatever its length .*?(\d+) sequences fit; "
        r"a full KV cache would be larger beyond ([\d,]+) tokens",
        server.log.read_text(),
    )
    assert line
    assert float(line[1]) > 1 and int(line[2]) >= 16 and int(line[3].replace(",", "")) > 100
