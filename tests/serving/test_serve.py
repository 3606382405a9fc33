"""What `lola-vllm serve` chooses, in a server that runs."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tools.support.server_process import Server
from tools.support.tiny import random_prompts


def complete(server: Server, prompt: object, **more: object) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, **more}  # fmt: skip
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def restored(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_answers_tell_of_cached_tokens(keyless):
    (prompt,) = random_prompts([300], seed=1)
    cached = [restored(complete(keyless, prompt)) for _ in range(3)]
    assert cached == [0, 299, 299]


def test_prompts_with_a_common_prefix_share_a_state(keyless):
    """Without prefix caching: the second one stores it, and what is left is computed as ever."""
    (shared,) = random_prompts([300], seed=2)
    prompts = [shared + tail for tail in random_prompts([40, 7, 90], seed=3)]
    answers = [complete(keyless, prompt) for prompt in prompts]
    assert [restored(answer) for answer in answers] == [0, 0, 300]
    for prompt, answer in zip(prompts, answers, strict=True):
        cold = complete(
            keyless, prompt, kv_transfer_params={"lola": {"from": False, "save": False}}
        )
        assert restored(cold) == 0
        assert cold["choices"][0]["token_ids"] == answer["choices"][0]["token_ids"]
    salted = complete(keyless, prompts[0], cache_salt="another")
    assert restored(salted) == 0


def test_without_a_key_nobody_lists_what_others_said(keyless):
    listed = keyless.client.get("/v1/lola/sessions")
    assert listed.status_code == 403 and "--lola-list-sessions" in listed.text
    body = {"prompt": [5, 6, 7], "turn": 0}
    named = "/v1/lola/sessions/by-its-name"
    assert keyless.client.post(f"{named}/append", json=body).status_code == 200
    assert keyless.client.get(f"{named}/tokens").json()["tokens"]
    for path in (named, f"{named}/tokens", "/v1/lola/info", "/lola/inspector"):
        foreign = keyless.client.get(path, headers={"Host": "evil.example"})
        assert foreign.status_code == 421, foreign.text
        assert "--lola-allowed-hosts" in foreign.json()["error"]["message"]
    assert keyless.client.delete(named).status_code == 200


def test_many_at_once_wait_for_one_to_read_what_they_share(keyless):
    (shared,) = random_prompts([280], seed=4)
    prompts = [shared + tail for tail in random_prompts([9] * 6, seed=5)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(keyless, prompt), prompts))
    first, second, *others = sorted(map(restored, answers))
    assert first == 0 and second in (0, 256)  # it may start from a waypoint of the first
    assert others == [280] * 4


def test_the_last_word_is_the_inspectors_address(keyless):
    address = f"{keyless.url}/lola/inspector"
    lines = keyless.log.read_text().splitlines()
    (said,) = (i for i, line in enumerate(lines) if line.endswith(address))
    (ready,) = (i for i, line in enumerate(lines) if "Application startup complete" in line)
    assert ready == said + 1
    assert keyless.client.get("/lola/inspector").status_code == 200
