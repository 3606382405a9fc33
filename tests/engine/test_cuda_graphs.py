"""Whole steps replayed from CUDA graphs, where there is a GPU (benchmarks/gpu.sh)."""

import pytest
import torch
from engine import engine, generate
from oracle import Oracle
from test_tokens import LENGTHS, LOLA, NEW, assert_obeys
from tiny import make_tiny, random_prompts

from lola_vllm.plugin.backend import GRAPHS_ENV


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
