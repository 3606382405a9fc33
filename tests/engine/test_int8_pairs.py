"""Sparse pairs of 8 bits in vLLM: what is served is what transformers compute.

Rounding is a step function: two forwards whose keys differ in their last bit may store numbers that
differ by one step, 1/127 of the largest. So log-probabilities are compared with a margin that such
steps stay below, and that models with other pairs do not.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams, TokensPrompt

import lola_vllm.engine.hf  # noqa: F401  (makes transformers know LoLA models)
from tests.support.engine import GREEDY, engine, metric, prompt_logprobs
from tools.support.tiny import make_tiny, random_prompts

LOLA = {
    "window_size": 16, "sparse_cache_size": 24, "sink_size": 2, "update_interval": 4,
    "sparse_dtype": "int8", "context_shift": 64,
}  # fmt: skip
MARGIN = 0.05
LENGTHS = [1, 33, 100, 300]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("int8"), LOLA, max_position_embeddings=256)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS, seed=6)


@torch.no_grad()
def expected(directory, prompts):
    """The same from transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        rows = model(ids, use_cache=True).logits[0, :-1].log_softmax(-1)
        found.append(rows.gather(1, ids[0, 1:, None])[:, 0])
    return found


@pytest.mark.parametrize("budget", [2048, 40])
def test_logprobs_are_those_of_transformers(model, prompts, budget):
    with engine(model, max_num_batched_tokens=budget, max_num_seqs=8) as llm:
        _, together = prompt_logprobs(llm, prompts)
    for got, wanted in zip(together, expected(model, prompts), strict=True):
        torch.testing.assert_close(torch.tensor(got), wanted, rtol=0, atol=MARGIN)


def test_other_pairs_would_be_seen(model, prompts):
    few = {"lola_config": {"sparse_cache_size": 2}}
    with engine(model, max_num_seqs=8, hf_overrides=few) as llm:
        _, other = prompt_logprobs(llm, prompts)
    wanted = expected(model, prompts)
    assert (torch.tensor(other[-1]) - wanted[-1]).abs().max() > 2 * MARGIN


def test_a_prefix_hit_takes_the_scales_along(model):
    (shared,) = random_prompts([100], seed=3)
    prompts = [shared + tail for tail in random_prompts([90, 60], seed=4)]
    params = SamplingParams(max_tokens=20, logprobs=0, **GREEDY)

    def answers(llm):
        outputs = [
            llm.generate(TokensPrompt(prompt_token_ids=p), params, use_tqdm=False)[0]
            for p in prompts
        ]
        return torch.tensor(
            [[next(iter(e.values())).logprob for e in o.outputs[0].logprobs] for o in outputs]
        )

    with engine(model, max_num_seqs=1) as llm:
        wanted = answers(llm)
    cached = {"enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 64}
    with engine(model, max_num_seqs=1, **cached) as llm:
        got = answers(llm)
        assert metric(llm, "vllm:prefix_cache_hits") > 60
    torch.testing.assert_close(got, wanted, rtol=0, atol=MARGIN)
