"""Mistral, Qwen2 and Qwen3 as bases: with a window above the length, LoLA is the stock model."""

import pytest
import torch

from lola_vllm.models.init import init_checkpoint
from tests.support.engine import engine, generate
from tests.support.families import FAMILIES, make_base
from tools.support.tiny import random_prompts

NEW = 16
PROMPTS = [[token % 300 for token in p] for p in random_prompts([1, 20, 63, 64, 150, 257], seed=3)]


@torch.no_grad()
def greedy(model, prompt):
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_window_reproduces_the_stock_model(tmp_path, family):
    stock = make_base(tmp_path / "base", family).double()
    init_checkpoint(tmp_path / "base", tmp_path / "lola", {"window_size": 1024})
    with engine(tmp_path / "lola", max_num_seqs=8, max_num_batched_tokens=64) as llm:
        assert generate(llm, PROMPTS, NEW) == [greedy(stock, prompt) for prompt in PROMPTS]
