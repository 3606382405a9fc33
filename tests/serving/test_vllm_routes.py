"""vLLM's own routes and switches: each works with a LoLA model, or is refused with words."""

import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import msgspec
import zmq

from tests.serving.sessions.test_routes import events
from tests.serving.test_lola_routes import complete

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def post(server, path, status=200, **fields):
    response = server.client.post(path, json={"model": "smollm2", **fields})
    assert response.status_code == status, response.text
    return response.json()


def chat(server, messages, **fields):
    sampling = {"max_tokens": 60, "temperature": 0}
    answer = post(server, "/v1/chat/completions", messages=messages, **sampling, **fields)
    (choice,) = answer["choices"]
    return choice, answer["usage"]["prompt_tokens"]


def streamed(server, path, **fields):
    body = {"model": "smollm2", "stream": True, **fields}
    with server.client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        return events(response)


def test_a_call_of_a_tool_is_found_in_what_the_model_says(lola_server):
    """Its words are given, as a small model does not find them."""
    forced = {"tools": [TOOL], "structured_outputs": {"choice": [CALL]}}
    choice, _ = chat(lola_server, WEATHER, **forced)
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    path, more = "/v1/chat/completions", {"messages": WEATHER, "max_tokens": 60, **forced}
    parts = streamed(lola_server, path, **more)
    deltas = [part["choices"][0]["delta"].get("tool_calls") for part in parts]
    pieces = [piece["function"] for delta in deltas for piece in delta or ()]
    assert "".join(piece.get("name") or "" for piece in pieces) == "get_weather"
    arguments = "".join(piece.get("arguments") or "" for piece in pieces)
    assert json.loads(arguments) == {"city": "Paris"}


def test_reasoning_is_parted_from_the_answer(server):
    """A model that does not reason is shown how; the parser knows the words of Granite models."""

    def said(thought, answer):
        words = f"Here is my thought process: {thought} Here is my response: {answer}"
        return {"role": "assistant", "content": words}

    numbers = ["One and one are two.", "Two and two are four.", "Three and three are six."]
    messages = []
    for i, thought in enumerate(numbers, start=1):
        messages += [{"role": "user", "content": f"What is {i} + {i}?"}, said(thought, 2 * i)]
    messages.append({"role": "user", "content": "What is 4 + 4?"})
    message = chat(server, messages)[0]["message"]
    assert message["content"].strip() == "8"
    assert message["reasoning"].strip() == "Four and four are eight."
    plain = chat(server, QUESTION)[0]["message"]
    assert "Paris" in plain["content"] and not plain["reasoning"]


def test_responses_follow_one_another(lola_server):
    limits = {"max_output_tokens": 16, "temperature": 0}
    first = post(lola_server, "/v1/responses", input=QUESTION[0]["content"], **limits)
    after = {"previous_response_id": first["id"], **limits}
    second = post(lola_server, "/v1/responses", input="And of Italy?", **after)
    assert "Paris" in first["output"][0]["content"][0]["text"]
    assert "Rome" in second["output"][0]["content"][0]["text"]
    assert second["usage"]["input_tokens"] > first["usage"]["total_tokens"]
    stored = lola_server.client.get(f"/v1/responses/{first['id']}").json()
    assert stored["output"] == first["output"]
    kinds = [e["type"] for e in streamed(lola_server, "/v1/responses", input="Hi", **limits)]
    assert "response.output_text.delta" in kinds and kinds[-1] == "response.completed"


def test_messages_of_anthropics_api(lola_server):
    body = {"messages": QUESTION, "max_tokens": 16, "temperature": 0}
    answer = post(lola_server, "/v1/messages", **body)
    assert "Paris" in answer["content"][0]["text"] and answer["stop_reason"] == "end_turn"
    counted = post(lola_server, "/v1/messages/count_tokens", messages=QUESTION)
    usage = answer["usage"]  # what was asked before is restored
    read = usage["input_tokens"] + (usage.get("cache_read_input_tokens") or 0)
    assert counted["input_tokens"] == read
    parts = streamed(lola_server, "/v1/messages", **body)
    text = "".join(e["delta"].get("text", "") for e in parts if e["type"] == "content_block_delta")
    assert text == answer["content"][0]["text"]


def test_messages_want_the_key_as_the_other_routes_do(lola_server):
    """Anthropic's clients send it as x-api-key, unless they are given an authorization token."""
    key = lola_server.client.headers["Authorization"].removeprefix("Bearer ")
    body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 4}
    for headers, status in (({"x-api-key": key}, 401), ({"Authorization": f"Bearer {key}"}, 200)):
        response = httpx.post(
            f"{lola_server.url}/v1/messages", json=body, headers=headers, timeout=60
        )
        assert response.status_code == status


def test_beams_and_batches_and_scores(lola_server):
    beams = post(
        lola_server, "/v1/completions", prompt="The capital of France is", max_tokens=4,
        use_beam_search=True, n=2, temperature=0,
    )  # fmt: skip
    assert "Paris" in beams["choices"][0]["text"] and len(beams["choices"]) == 2
    batch = post(
        lola_server, "/v1/chat/completions/batch", messages=[QUESTION, QUESTION], max_tokens=16,
        temperature=0,
    )  # fmt: skip
    assert ["Paris" in c["message"]["content"] for c in batch["choices"]] == [True, True]


def test_events_of_the_prefix_cache_tell_of_kept_states(lola_server):
    """Of a state there is one block, which stands for all tokens before it."""
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.connect(lola_server.events)
        subscriber.subscribe(b"")
        time.sleep(1)  # what is published before the subscription has arrived is lost
        prompt = random.Random(4).choices(range(100, 40_000), k=700)
        post(lola_server, "/v1/completions", prompt=prompt, max_tokens=1)
        found = []
        while subscriber.poll(2_000):
            found += msgspec.msgpack.decode(subscriber.recv_multipart()[-1])[1]
    (stored,) = (event for event in found if event["type"] == "BlockStored")
    assert stored["token_ids"] == prompt[:512]
    assert (stored["block_size"], len(stored["block_hashes"])) == (256, 1)
    assert stored["kv_cache_spec_kind"] == "mamba"


def test_completions(server):
    response = complete(server, "Gravity is", max_tokens=12)
    choice = response["choices"][0]
    assert "fundamental" in choice["text"]
    assert choice["finish_reason"] == "length"
    assert response["usage"]["completion_tokens"] == 12


def test_chat_plain_and_streamed(server):
    body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 16, "temperature": 0}
    plain = server.client.post("/v1/chat/completions", json=body)
    assert plain.status_code == 200
    text = plain.json()["choices"][0]["message"]["content"]
    assert "Paris" in text
    body["stream"] = True
    with server.client.stream("POST", "/v1/chat/completions", json=body) as lines:
        deltas = [event["choices"][0]["delta"] for event in events(lines)]
    assert "".join(delta.get("content") or "" for delta in deltas) == text


def test_requests_without_sampling_fields_get_those_of_the_model(server, lola_server):
    """With vLLM's own defaults about half of the answers of this model name the city."""
    body = {"messages": QUESTION, "max_tokens": 16}
    five = {"model": "smollm2", **body, "n": 5}
    response = server.client.post("/v1/chat/completions", json=five).json()
    answers = [choice["message"]["content"] for choice in response["choices"]]
    for seed in range(5):
        path = f"/v1/lola/sessions/paris-{seed}/chat"
        said = lola_server.client.post(path, json={**body, "seed": seed}).json()
        answers.append(said["choices"][0]["message"]["content"])
    assert len(answers) == 10 and all("Paris" in answer for answer in answers), answers


def test_sixteen_at_once_answer_as_they_would_alone(server):
    # Prompts whose next tokens are certain: near ties may turn with the size of a batch.
    prompts = [f"Count: {i}, {i + 1}, {i + 2}, {i + 3}, {i + 4}," for i in range(1, 17)]

    def answer(prompt):
        return complete(server, prompt, max_tokens=6)["choices"][0]["text"]

    alone = list(map(answer, prompts))
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(answer, prompts)) == alone


def test_a_client_that_leaves_disturbs_nobody(server):
    body = {"model": "smollm2", "prompt": "Once", "max_tokens": 500, "stream": True}
    for _ in range(4):
        with server.client.stream("POST", "/v1/completions", json=body) as lines:
            next(lines.iter_lines())
    assert complete(server, "Gravity is")["choices"]


def test_start_up_says_what_a_sequence_costs(server):
    line = re.search(
        r"LoLA: ([\d.]+) MiB per sequence whatever its length .*?(\d+) sequences fit; "
        r"a full KV cache would be larger beyond ([\d,]+) tokens",
        server.log.read_text(),
    )
    assert line
    assert float(line[1]) > 1 and int(line[2]) >= 16 and int(line[3].replace(",", "")) > 100
