"""One maths core, two runtimes: vLLM's log-probabilities are those of the Hugging Face model.

The checkpoints are written by `save_pretrained`, name remote code (`auto_map`), and are served
without `--trust-remote-code`.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams, TokensPrompt

import lola_vllm.engine.hf
from lola_vllm.models.init import init_checkpoint
from tests.support.engine import engine
from tests.support.families import make_base
from tools.support.tiny import random_prompts

LOLA = {"window_size": 32, "sparse_cache_size": 48, "sink_size": 2}
PROMPTS = [[token % 300 for token in p] for p in random_prompts([2, 33, 64, 150, 257], seed=3)]
NEW = 40


def make_checkpoint(directory, family):
    """Random feature maps and gates, so that every one of them tells."""
    make_base(directory / "base", family)
    init_checkpoint(directory / "base", directory / "init", LOLA, "query")
    model = AutoModelForCausalLM.from_pretrained(directory / "init").eval()
    assert isinstance(model, lola_vllm.engine.hf.LolaForCausalLM)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "feature_map" in name:
                parameter.normal_(0, 0.4)
            elif "window_factors" in name:
                parameter.normal_()
    model.save_pretrained(directory / "lola")
    assert model.config.auto_map
    return directory / "lola", model


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # biases; norms of queries and keys
@torch.no_grad()
def test_logprobs_are_those_of_vllm(tmp_path, family):
    directory, model = make_checkpoint(tmp_path, family)
    params = SamplingParams(
        max_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=5, detokenize=False
    )
    with engine(directory, max_num_batched_tokens=64, max_num_seqs=8) as llm:
        requests = [TokensPrompt(prompt_token_ids=p) for p in PROMPTS]
        outputs = llm.generate(requests, params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        answer = output.outputs[0]
        ids = torch.tensor([prompt + list(answer.token_ids)[:-1]])
        rows = model(ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
        for row, entries in zip(rows, answer.logprobs, strict=True):
            got = torch.tensor([entry.logprob for entry in entries.values()])
            torch.testing.assert_close(got, row[list(entries)], rtol=0, atol=1e-4)
        generated = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
        assert generated[0, len(prompt) :].tolist() == list(answer.token_ids)
