"""A model with an importance: vLLM chooses as the float64 recompute and as transformers do."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm import SamplingParams, TokensPrompt

import lola_vllm.engine.hf
from lola_vllm.models import CheckpointError
from tests.support.engine import engine, generate, metric
from tests.support.oracle import Oracle, assert_obeys
from tools.support.tiny import make_tiny, random_prompts

LOLA = {"window_size": 16, "sparse_cache_size": 24, "sink_size": 2}
NEW = 20


@pytest.mark.parametrize(
    ("lola", "state_heads"),
    [
        ({}, 2),
        ({"update_interval": 1}, 2),
        ({"update_interval": 7, "sparse_sharing": "kv_head"}, 4),
    ],
    ids=["chunked", "paper", "shared"],
)
def test_tokens_obey_the_recompute_however_prompts_are_cut(tmp_path, lola, state_heads):
    model = make_tiny(tmp_path, {**LOLA, **lola}, state_heads=state_heads, importance=True)
    prompts = random_prompts([1, 33, 100, 257], seed=5)
    oracle, answers = Oracle(model), []
    for budget in (2048, 64):
        with engine(model, max_num_batched_tokens=budget, max_num_seqs=8) as llm:
            answers.append(generate(llm, prompts, NEW))
    for prompt, tokens in zip(prompts, answers[0], strict=True):
        assert_obeys(oracle, prompt, tokens)
    assert answers[0] == answers[1]


@torch.no_grad()
def test_logprobs_are_those_of_transformers(tmp_path):
    model_dir = make_tiny(tmp_path, LOLA, importance=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    assert isinstance(model, lola_vllm.engine.hf.LolaLlamaForCausalLM)
    prompts = random_prompts([33, 150], seed=6)
    params = SamplingParams(
        max_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=5, detokenize=False
    )
    with engine(model_dir, max_num_batched_tokens=64, max_num_seqs=8) as llm:
        requests = [TokensPrompt(prompt_token_ids=p) for p in prompts]
        outputs = llm.generate(requests, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0]
        ids = torch.tensor([prompt + list(answer.token_ids)[:-1]])
        rows = model(ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
        for row, entries in zip(rows, answer.logprobs, strict=True):
            got = torch.tensor([entry.logprob for entry in entries.values()])
            torch.testing.assert_close(got, row[list(entries)], rtol=0, atol=1e-4)


def test_a_prefix_hit_takes_the_importance_along(tmp_path):
    model = make_tiny(tmp_path, LOLA, importance=True)
    (shared,) = random_prompts([100], seed=3)
    prompts = [shared + tail for tail in random_prompts([120, 7, 60], seed=4)]
    with engine(model, max_num_seqs=8) as llm:
        expected = generate(llm, prompts, NEW)
    cached = {"enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 64}
    with engine(model, max_num_seqs=1, **cached) as llm:
        assert [generate(llm, [prompt], NEW)[0] for prompt in prompts] == expected
        assert metric(llm, "vllm:prefix_cache_hits") > 100


def test_an_importance_that_some_layers_lack_is_named(tmp_path):
    model = make_tiny(tmp_path, LOLA, importance=True)
    tensors = load_file(model / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.endswith("1.self_attn.importance")}
    save_file(kept, model / "model.safetensors")
    words = r"importance \[2, 25\]; other layers have theirs"
    with pytest.raises(CheckpointError, match=words), engine(model):
        pass
