"""Ranks share the heads or the layers of a model, and answer as one rank does.

A machine with one NUMA node needs `VLLM_CPU_OMP_THREADS_BIND` (tests/conftest.py sets it): vLLM
binds each CPU worker to a node of its own otherwise, and refuses to start.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from vllm import SamplingParams, TokensPrompt

from lola_vllm.serving.engine import joined
from tests.support.engine import GREEDY, engine, prompt_logprobs, state_manager
from tools.support.tiny import make_tiny, random_prompts

LOLA = {"window_size": 16, "sparse_cache_size": 8, "context_shift": 16}
LENGTH = 64  # that was trained: most prompts are longer
NEW = 16
PROMPTS = random_prompts([3, 33, 90, 170], seed=3)


def answers(model, **options):
    """Greedy tokens and prompt log-probabilities, what the block manager says of a page, and what
    the workers hold of a prompt, joined."""
    with engine(model, max_num_batched_tokens=64, max_num_seqs=8, **options) as llm:
        tokens, logprobs = prompt_logprobs(llm, PROMPTS, NEW)
        for watching in llm.collective_rpc("lola_watch", args=("m", 90)):
            assert watching == {}
        params = SamplingParams(max_tokens=1, **GREEDY)
        core = llm.llm_engine
        core.add_request("m", TokensPrompt(prompt_token_ids=PROMPTS[2]), params)
        while core.has_unfinished_requests():
            core.step()
        found = llm.collective_rpc("lola_memory", args=("m", None))
        return tokens, logprobs, state_manager(llm).spec, joined([x["layers"] for x in found])


def assert_same(one, several):
    tokens, logprobs, _, held = one
    assert several[0] == tokens
    for a, b in zip(logprobs, several[1], strict=True):
        assert b == pytest.approx(a, abs=1e-4)  # sums over ranks round in another order
    assert len(held) == len(several[3]) > 1
    for a, b in zip(held, several[3], strict=True):
        assert (a.layer, len(a.heads)) == (b.layer, len(b.heads))
        for x, y in zip(a.heads, b.heads, strict=True):
            assert (x.positions, x.folded) == (y.positions, y.folded)
            assert x.folded > 0


def test_ranks_that_share_the_kv_head_answer_as_one(tmp_path):
    model = make_tiny(
        tmp_path, LOLA, kv_heads=1, state_heads=1, importance=True, max_position_embeddings=LENGTH
    )
    one, two = answers(model), answers(model, tensor_parallel_size=2)
    assert_same(one, two)
    assert two[2].sequence == one[2].sequence  # each rank has the whole page


def test_pipeline_parallel_stages_answer_as_one(tmp_path):
    """Three layers on two stages: the layers and the bytes per sequence differ by rank."""
    lola = LOLA | {"sparse_cache_size": [40, 0, 9]}
    model = make_tiny(tmp_path, lola, layers=3, max_position_embeddings=LENGTH)
    one = answers(model)
    assert_same(one, answers(model, pipeline_parallel_size=2, enforce_eager=False))


def test_two_nodes_answer_as_one(tmp_path):
    """vLLM's multiprocessing executor on two nodes, here two processes on the loopback device.

    Also the heads of a layer divided, with a state per query head.
    """
    model = make_tiny(
        tmp_path / "model", LOLA, state_heads=4, importance=True, max_position_embeddings=LENGTH
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path / "second.log"
    with log.open("wb") as out:
        second = subprocess.Popen(
            [str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--headless",
             "--tensor-parallel-size", "2", "--nnodes", "2", "--node-rank", "1",
             "--master-addr", "127.0.0.1", "--master-port", str(port),
             "--distributed-executor-backend", "mp", "--skip-tokenizer-init",
             "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
             "--kv-cache-memory-bytes", str(64 * 2**20), "--no-enable-prefix-caching",
             "--max-num-batched-tokens", "64", "--max-num-seqs", "8"],
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
        )  # fmt: skip
    try:
        two = answers(
            model, tensor_parallel_size=2, nnodes=2, node_rank=0, master_addr="127.0.0.1",
            master_port=port, distributed_executor_backend="mp",
        )  # fmt: skip
        assert "rank 1 in world size 2" in log.read_text()
    except Exception as error:
        raise AssertionError(f"the second node said:\n{log.read_text()[-3000:]}") from error
    finally:
        os.killpg(second.pid, 15)
        try:
            second.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(second.pid, 9)
            second.wait()
    one = answers(model)
    assert_same(one, two)
    whole, rank = one[2].sequence.layouts[0].part_bytes, two[2].sequence.layouts[0].part_bytes
    assert {name: 2 * size for name, size in rank.items()} == whole
