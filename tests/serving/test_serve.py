"""What `lola-vllm serve` chooses, in a server that runs: with and without torch.compile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from lola_vllm.memory.sessions.names import SHARED
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes, namespace
from tests.support.servers import MODEL
from tools.support.server_process import BIN, Server, serving
from tools.support.tiny import make_tiny, random_prompts

# One piece, several, and more than a window and an update.
PROMPTS = random_prompts([3, 40, 150])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, so that compiling is short; any tokenizer will do for its ids."""
    lola = {"window_size": 16, "sparse_cache_size": 8}
    out = make_tiny(tmp_path_factory.mktemp("serve") / "tiny", lola)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, out)
    return out


def start(tiny: Path, log: Path, *options: str) -> AbstractContextManager[Server]:
    command = [str(BIN / "lola-vllm"), "serve", str(tiny), "--dtype", "float32",
               "--max-num-seqs", "8", "--max-model-len", "512", *options]  # fmt: skip
    return serving(log, command, VLLM_CACHE_ROOT=str(log.with_suffix(".cache")))


@pytest.fixture(scope="module")
def eager(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with start(tiny, tmp_path_factory.mktemp("eager") / "log.txt") as server:
        yield server


def complete(server: Server, prompt: object, **more: object) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, **more}  # fmt: skip
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def tokens(server: Server) -> list[list[int]]:
    """Greedy tokens of each prompt, all asked at once."""
    return [choice["token_ids"] for choice in complete(server, PROMPTS)["choices"]]


def test_the_name_is_the_directorys_alone(eager: Server, tiny: Path) -> None:
    names = [model["id"] for model in eager.client.get("/v1/models").json()["data"]]
    assert names == [tiny.name]


def restored(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_answers_tell_of_cached_tokens(eager: Server) -> None:
    (prompt,) = random_prompts([300], seed=1)
    cached = [restored(complete(eager, prompt)) for _ in range(3)]
    assert cached == [0, 299, 299]


def test_prompts_with_a_common_prefix_share_a_state(eager: Server) -> None:
    """Without prefix caching: the second one stores it, and what is left is computed as ever."""
    (shared,) = random_prompts([300], seed=2)
    prompts = [shared + tail for tail in random_prompts([40, 7, 90], seed=3)]
    answers = [complete(eager, prompt) for prompt in prompts]
    assert [restored(answer) for answer in answers] == [0, 0, 300]
    for prompt, answer in zip(prompts, answers, strict=True):
        cold = complete(eager, prompt, kv_transfer_params={"lola": {"from": False, "save": False}})
        assert restored(cold) == 0
        assert cold["choices"][0]["token_ids"] == answer["choices"][0]["token_ids"]
    name = SHARED + PrefixHashes(namespace(""), shared).prefix_hash(300).hex()[:16]
    session = eager.client.get(f"/v1/lola/sessions/{name}").json()
    assert (session["tokens"], session["turns"]) == (300, [1])
    salted = complete(eager, prompts[0], cache_salt="another")
    assert restored(salted) == 0


def test_without_a_key_nobody_lists_what_others_said(eager: Server) -> None:
    listed = eager.client.get("/v1/lola/sessions")
    assert listed.status_code == 403 and "--lola-list-sessions" in listed.text
    body = {"prompt": [5, 6, 7], "turn": 0}
    named = "/v1/lola/sessions/by-its-name"
    assert eager.client.post(f"{named}/append", json=body).status_code == 200
    assert eager.client.get(f"{named}/tokens").json()["tokens"]
    for path in (named, f"{named}/tokens", "/v1/lola/info", "/lola/inspector"):
        foreign = eager.client.get(path, headers={"Host": "evil.example"})
        assert foreign.status_code == 421, foreign.text
        assert "--lola-allowed-hosts" in foreign.json()["error"]["message"]
    assert eager.client.delete(named).status_code == 200


def test_the_start_says_what_is_kept(eager: Server) -> None:
    log = eager.log.read_text()
    assert "of stored states, in memory only" in log
    (line,) = (part for part in log.splitlines() if "LoLA sessions: states of" in part)
    assert "are kept: of all conversations in" in line and "nothing for the next start" in line
    assert "--lola-store none keeps nothing" in line


def test_many_at_once_wait_for_one_to_read_what_they_share(eager: Server) -> None:
    (shared,) = random_prompts([280], seed=4)
    prompts = [shared + tail for tail in random_prompts([9] * 6, seed=5)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(eager, prompt), prompts))
    first, second, *others = sorted(map(restored, answers))
    assert first == 0 and second in (0, 256)  # it may start from a waypoint of the first
    assert others == [280] * 4


def test_the_last_word_is_the_inspectors_address(eager: Server) -> None:
    address = f"{eager.url}/lola/inspector"
    lines = eager.log.read_text().splitlines()
    (said,) = (i for i, line in enumerate(lines) if line.endswith(address))
    (ready,) = (i for i, line in enumerate(lines) if "Application startup complete" in line)
    assert ready == said + 1
    assert eager.client.get("/lola/inspector").status_code == 200


@pytest.mark.slow
def test_compiled_answers_are_those_of_eager_ones(
    eager: Server, tiny: Path, tmp_path: Path
) -> None:
    """torch.compile is the default of `vllm serve`, and of servers on a GPU."""
    log = tmp_path / "compiled.log"
    with start(tiny, log, "--no-enforce-eager") as server:
        compiled = tokens(server)
    assert [len(answer) for answer in compiled] == [40] * len(PROMPTS)
    assert len({tuple(answer) for answer in compiled}) == len(PROMPTS)
    assert compiled == tokens(eager)
    for words in ("torch.compile runs before", "Warming up model for the compilation"):
        assert [words in text for text in (log.read_text(), eager.log.read_text())] == [True, False]
