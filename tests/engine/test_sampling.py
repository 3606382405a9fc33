"""What a request may ask for beside greedy tokens: n, seeds, logprobs, stops, structured output."""

import pytest
import torch
from vllm import SamplingParams, TokensPrompt

from tests.support.engine import GREEDY, engine, prompt_logprobs, state_manager
from tests.support.oracle import Oracle
from tools.support.tiny import random_prompts

LOLA = {"window_size": 16, "sparse_cache_size": 24}
PROMPTS = random_prompts([1, 16, 45, 130, 222], seed=8)
SEEDED = {"temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def drawn_uncut(tiny):
    """Seeded answers to prompts that are prefilled at once."""
    with engine(tiny, max_num_batched_tokens=2048, max_num_seqs=8) as llm:
        return copies(llm, **SEEDED)


@pytest.fixture(scope="module", params=[False, True], ids=["no-prefix-cache", "prefix-cache"])
def llm(request, tiny, drawn_uncut):  # one engine at a time in a process
    with engine(
        tiny, max_num_batched_tokens=64, max_num_seqs=8, block_size=32,
        enable_prefix_caching=request.param,
    ) as llm:  # fmt: skip
        yield llm
        assert state_manager(llm).num_states_in_use == 0


def copies(llm, **sampling):
    """Tokens `[prompt][copy]`."""
    params = SamplingParams(**{**GREEDY, "max_tokens": 20, **sampling})
    requests = [TokensPrompt(prompt_token_ids=p) for p in PROMPTS]
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [[tuple(c.token_ids) for c in o.outputs] for o in outputs]


def test_a_seed_repeats_the_same_different_copies(llm):
    first = copies(llm, n=3, temperature=1.0, seed=11)
    assert copies(llm, n=3, temperature=1.0, seed=11) == first
    assert all(len(set(answers)) == 3 for answers in first)
    assert copies(llm, n=3, temperature=1.0, seed=12) != first


def test_a_seed_draws_the_same_whether_or_not_the_prompt_is_cut(llm, drawn_uncut):
    """vLLM's own CPU worker dies of the first piece of a seeded prompt."""
    assert copies(llm, **SEEDED) == drawn_uncut


def test_prompt_logprobs_are_close_to_the_recompute(llm, tiny):
    oracle = Oracle(tiny)
    for prompt, row in zip(PROMPTS, prompt_logprobs(llm, PROMPTS)[1], strict=True):
        truth = oracle.logprobs(prompt)[range(len(prompt) - 1), prompt[1:]]
        torch.testing.assert_close(torch.tensor(row).double(), truth, rtol=0, atol=1e-4)
