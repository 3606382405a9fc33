"""Whole steps replayed from CUDA graphs, where there is a GPU (benchmarks/gpu.sh)."""

import pytest
import torch

from lola_vllm.engine.vllm.backend import GRAPHS_ENV
from tests.support.engine import engine, generate
from tests.support.oracle import Oracle, assert_obeys
from tools.support.tiny import make_tiny, random_prompts

LOLA = {"window_size": 32, "sparse_cache_size": 48}
LENGTHS = [1, 2, 31, 32, 33, 64, 65, 100, 128, 150, 257, 300]
NEW = 24


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("ops", ["triton", "cuda"])
def test_replayed_steps_obey_the_recompute(tmp_path, monkeypatch, ops):
    """Prompts of one token arrive while others decode: such steps have the shape of a graph."""
    monkeypatch.setenv(GRAPHS_ENV, "full")
    monkeypatch.setenv("LOLA_VLLM_OPS", ops)
    model = make_tiny(tmp_path, LOLA)
    prompts = [[i + 1] if i % 2 else p for i, p in enumerate(random_prompts(LENGTHS * 2))]
    with engine(model, enforce_eager=False, max_num_seqs=5, max_num_batched_tokens=64) as llm:
        tokens = generate(llm, prompts, NEW)
    oracle = Oracle(model)
    for prompt, answer in zip(prompts, tokens, strict=True):
        assert_obeys(oracle, prompt, answer)
