"""The routes under /v1/lola and the metrics lola:*, through `lola-vllm serve`."""

import asyncio
import http.client
import json
import re
import time

import httpx
import pytest
from fastapi import HTTPException

from lola_vllm.serving import engine as engine_module
from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.metrics import GAUGES, REFRESH_S
from tests.support.dashboard import queried

NEEDLE = "The code of the vault is 73192."
STORY = "The miller went to the river and the river went to the sea. " * 30
PROMPT = f"{STORY}{NEEDLE} {STORY}"


def read(server, **body):
    response = server.client.post("/v1/lola/memory", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def complete(server, prompt, headers=None, **fields):
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
    response = server.client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def metrics(server):
    """Every lola:* sample of a scrape: name and its own labels -> value."""
    found = {}
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith("lola:"):
            name, labels, value = re.fullmatch(r"(lola:\w+)\{(.*)\} (\S+)", line).groups()
            assert 'model_name="smollm2"' in labels and 'engine="0"' in labels
            pairs = re.search(r'pairs="(\w+)"', labels)
            found[name + (f".{pairs[1]}" if pairs else "")] = float(value)
    return found


def hits(server):
    """Tokens that were found in vLLM's prefix cache."""
    scrape = server.client.get("/metrics").text
    return float(re.search(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", scrape, re.M)[1])


@pytest.mark.parametrize("key", [None, "wrong"])
def test_every_route_wants_the_key(lola_server, key):
    """But for the page that asks for one."""
    paths = lola_server.client.get("/openapi.json").json()["paths"]
    routes = [(verb, path) for path, verbs in paths.items() if "/lola" in path for verb in verbs]
    routes.remove(("get", "/lola/inspector"))
    assert len(routes) == 22
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    for verb, path in routes:
        answer = httpx.request(verb, lola_server.url + path, headers=headers, json={"prompt": "x"})
        assert answer.status_code == 401, (verb, path)
        assert "lola_config" not in answer.text and "<html" not in answer.text


def test_plain_vllm_serve_has_no_such_routes(server):
    assert server.client.get("/v1/lola/info").status_code == 404
    assert "lola:" not in server.client.get("/metrics").text


def test_serve_says_what_it_chose(lola_server):
    log = lola_server.log.read_text()
    assert re.search(r"--max-num-seqs \d+\n +\d+ per core", log)
    assert "LoLA state pool: " in log
    chosen, running = log.split("running: ", 1)
    assert "--block-size" not in chosen and "and your options" in running.splitlines()[0]


def test_info(lola_server):
    info = lola_server.client.get("/v1/lola/info").json()
    assert info["model"] == "smollm2"
    sizes = info["lola_config"]["sparse_cache_size"]
    assert len(sizes) == 30 and sum(sizes) == 126 * 30
    memory = info["memory"]
    assert sum(memory["parts"].values()) == memory["bytes_per_state"]
    assert memory["bytes_per_sequence"] == 2 * memory["bytes_per_state"]
    assert info["states"]["per_sequence"] == 2  # prefix caching is on
    assert info["states"]["sequences"] == info["states"]["total"] // 2 > 0
    assert info["states"]["used"] == 0
    assert info["block_size"] == 256
    assert info["backend"].split()[0] in ("cpp", "torch")
    assert set(info["versions"]) == {"lola_vllm", "vllm", "torch", "python"}


def test_memory_of_a_text(lola_server):
    answer = read(lola_server, prompt=PROMPT)
    n = answer["num_tokens"]
    assert "".join(answer["texts"]) == PROMPT
    assert len(answer["tokens"]) == len(answer["texts"]) == n
    assert [layer["layer"] for layer in answer["layers"]] == list(range(30))
    sinks, start = answer["sinks"], answer["window_start"]
    assert sinks == 4 and n - 128 < start <= n - 64
    config = lola_server.client.get("/v1/lola/info").json()["lola_config"]
    for layer, size in zip(answer["layers"], config["sparse_cache_size"], strict=True):
        assert [head["sparse_cache_size"] for head in layer["heads"]] == [size] * 3
        for head in layer["heads"]:
            lam = min(size, start - sinks)
            assert head["folded"] == start - sinks - lam
            positions = head["positions"]
            assert positions == sorted(set(positions))
            assert len(positions) == len(head["errors"]) == len(head["score_weights"]) == lam
            assert sinks <= positions[0] and positions[-1] < start
            assert all(error >= 0 for error in head["errors"])
            assert all(weight > 0 for weight in head["score_weights"])
    held = [head["positions"] for layer in answer["layers"] for head in layer["heads"]]
    assert len({tuple(positions) for positions in held}) > 80  # each head chooses for itself


def test_memory_of_token_ids_and_of_single_layers(lola_server):
    text = read(lola_server, prompt=PROMPT, layers=[3, 29])
    ids = read(lola_server, prompt=text["tokens"], layers=[29, 3])
    assert [layer["layer"] for layer in ids["layers"]] == [3, 29]
    assert ids["layers"] == text["layers"]


def test_memory_of_a_chat(lola_server):
    messages = [{"role": "user", "content": f"Where does this go? {STORY}"}]
    answer = read(lola_server, messages=messages, model="smollm2", layers=[0])
    text = "".join(answer["texts"])
    assert text.endswith("<|im_start|>assistant\n") and STORY.strip() in text
    open_ = read(lola_server, messages=messages, add_generation_prompt=False, layers=[0])
    assert "".join(open_["texts"]) == text.removesuffix("<|im_start|>assistant\n")


def test_texts_of_characters_that_take_several_tokens(lola_server):
    text = "Grüße, 你好, 🦙🦙 и привет"
    answer = read(lola_server, prompt=text, layers=[0])
    assert "".join(answer["texts"]) == text
    assert "" in answer["texts"]  # some tokens only start a character


BAD = {
    "too-long": ({"prompt": STORY * 8}, 400, "from 1 to 2047"),
    "salt": ({"prompt": "x", "cache_salt": "a" * 129}, 400, "cache_salt"),
    "just-too-long": ({"prompt": [5] * 2048}, 400, "from 1 to 2047"),
    "id-too-large": ({"prompt": [1, 49152]}, 400, "token id 49152 is none of 0 to 49151"),
    "layer": ({"prompt": "x", "layers": [30]}, 400, "30 is none of 0 to 29"),
    "model": ({"prompt": "x", "model": "other"}, 404, "'other' is not served"),
}


@pytest.mark.parametrize(("body", "status", "words"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused(lola_server, body, status, words):
    response = lola_server.client.post(
        "/v1/lola/memory", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert words in message and "[type=" not in message  # as pydantic writes


def test_cached_prefixes_are_shared_within_a_salt_only(lola_server):
    prompt = f"Of salt. {PROMPT}"
    found = []
    for salt in ("sea", "rock", "sea", None, None, "rock"):
        before = hits(lola_server)
        fields = {} if salt is None else {"cache_salt": salt}
        read(lola_server, prompt=prompt, layers=[0], **fields)
        found.append(hits(lola_server) - before >= 256)
    assert found == [False, False, True, False, True, True]


class Silent:
    """An engine that answers nothing, of a model that is none of ours."""

    class vllm_config:
        class model_config:
            hf_config = None

    async def collective_rpc(self, method, args):
        await asyncio.sleep(60)


def test_an_engine_that_does_not_answer_is_unavailable(monkeypatch):
    monkeypatch.setattr(engine_module, "ANSWER_LIMIT_S", 0.01)
    with pytest.raises(
        HTTPException, match=r"did not answer lola_describe within 0\.01 s"
    ) as error:
        asyncio.run(LolaEngine(Silent(), "model").ask_workers("lola_describe"))
    assert error.value.status_code == 503


def test_a_client_that_leaves_holds_no_copy(lola_server):
    """Abandoned readings would use up the copies that may wait, and then nobody could read."""
    headers = {
        "Authorization": lola_server.client.headers["Authorization"],
        "Content-Type": "application/json",
    }
    for i in range(6):
        # A raw connection, as a client's time limit may find the answer there on a busy machine.
        leaver = http.client.HTTPConnection(httpx.URL(lola_server.url).netloc.decode())
        leaver.request("POST", "/v1/lola/memory", json.dumps({"prompt": f"{i} {PROMPT}"}), headers)
        time.sleep(0.05)
        leaver.close()
    assert read(lola_server, prompt="Still there?")["num_tokens"] > 2
    deadline = time.monotonic() + 20
    while lola_server.client.get("/v1/lola/info").json()["states"]["used"] > 0:
        assert time.monotonic() < deadline, "a reading that nobody waits for keeps its state"
        time.sleep(0.2)


def test_metrics(lola_server):
    """Those of the dashboard and the alerts are among them."""
    complete(lola_server, PROMPT, max_tokens=40, ignore_eos=True)
    time.sleep(REFRESH_S + 0.2)
    found = metrics(lola_server)
    assert set(found) >= {f"lola:{name}" for name in GAUGES}
    assert not [name for name in found if name.endswith("_created")]
    info = lola_server.client.get("/v1/lola/info").json()
    assert found["lola:states_total"] == info["states"]["total"]
    assert found["lola:state_bytes"] == info["memory"]["bytes_per_state"]
    assert found["lola:states_per_sequence"] == 2
    assert found["lola:states_used"] == 0
    # A scrape at once repeats what is known.
    assert metrics(lola_server) == found
    scrape = lola_server.client.get("/metrics").text
    wanted = queried()
    assert len(wanted) > 15 and {f"lola:{name}" for name in GAUGES} <= wanted
    assert wanted <= set(re.findall(r"^((?:lola|vllm):\w+)", scrape, re.MULTILINE))
    for line in scrape.splitlines():  # every query selects by this label
        if line.startswith(tuple(wanted)):
            assert 'model_name="smollm2"' in line


def test_states_used_while_sequences_run(lola_server):
    async def busy():
        key = {"Authorization": lola_server.client.headers["Authorization"]}
        async with httpx.AsyncClient(base_url=lola_server.url, headers=key, timeout=120) as client:
            body = {"model": "smollm2", "prompt": STORY, "max_tokens": 1500, "ignore_eos": True}
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in "123"]
            for _ in range(12):  # until all have begun, which a slow machine takes its time for
                await asyncio.sleep(REFRESH_S)
                scrape = (await client.get("/metrics")).text
                info = (await client.get("/v1/lola/info")).json()
                used = float(re.search(r"lola:states_used\{.*\} (\S+)", scrape)[1])
                if used >= 3:
                    break
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return used, info

    used, info = asyncio.run(busy())
    assert 3 <= used <= 6 and 3 <= info["states"]["used"] <= 6
