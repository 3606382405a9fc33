"""Models of many families, served: the answers are those of transformers and of its stock model.

Here is one family of each kind; `tests/unit/models/test_families.py` has all of them in
transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo import convert_frame
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm import SamplingParams, TokensPrompt

import lola_vllm.engine.hf  # noqa: F401  (makes transformers know LoLA models)
from lola_vllm.models.init import init_checkpoint
from tests.support.engine import ask, engine, store_options
from tests.support.families import make_base

LENGTH, NEW = 170, 12  # past the first context shift, at 128 tokens, and the second
SERVED = (
    "cohere2",  # neighbours turn together, parallel blocks, sliding layers alone have RoPE
    "gemma3_text",  # norms of q and k, sliding layers with a RoPE of their own
    "glm",  # half of a head turns
    "gpt_oss",  # learned sinks, also of sliding layers, experts with biases
    "granite",  # multipliers, a scale of attention
    "mixtral",  # experts
    "olmo2",  # norms behind, and of q and k as a whole
    "phi3",  # one matrix for q, k and v
    "qwen2",  # biases, in vLLM's own Llama
    "qwen3",  # norms of queries and keys, in vLLM's own Llama
    "smollm3",  # a layer without RoPE
    "starcoder2",  # LayerNorm and biases
)
COMPILED = ("gemma3_text", "mixtral")  # sliding layers, experts
STORED = (*COMPILED, "glm")  # and a part of a head


@pytest.fixture
def decoder(family: str, tmp_path: Path) -> Iterator[PreTrainedModel]:
    """A base. Its decoder's class is afterwards what it was: vLLM's backend makes it compile, in a
    process for good, and then only vLLM can build one."""
    base = make_base(tmp_path / "base", family, max_position_embeddings=128)
    kind = type(base.model)
    bases, own = kind.__bases__, dict(vars(kind))
    yield base
    convert_frame._bytecode_hooks.clear()  # of vLLM 0.33, which asks the class in each of them
    kind.__bases__ = bases
    for name in set(vars(kind)) - set(own):
        delattr(kind, name)
    for name in ("__init__", "__call__"):
        if name in own:
            setattr(kind, name, own[name])


@pytest.mark.parametrize("family", SERVED)
@torch.no_grad()
def test_answers_are_those_of_transformers(
    tmp_path: Path, family: str, decoder: PreTrainedModel
) -> None:
    small = {"window_size": 8, "sparse_cache_size": 8, "sink_size": 2}
    init_checkpoint(tmp_path / "base", tmp_path / "lola", small)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lola").eval()
    prompt = torch.randint(0, 300, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [prompt[:5], prompt]
    # Before the engine starts: it makes the decoder's class compile, in this process for good.
    stock = decoder(torch.tensor([prompts[0]])).logits[0, -1].log_softmax(-1)
    wanted = [_greedy(model, ids) for ids in prompts]
    params = SamplingParams(
        max_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=5, detokenize=False
    )
    compiled = {"enforce_eager": False} if family in COMPILED else {}
    with engine(tmp_path / "lola", max_num_batched_tokens=64, max_num_seqs=8, **compiled) as llm:
        requests = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        outputs = llm.generate(requests, params, use_tqdm=False)
    for (tokens, rows), output in zip(wanted, outputs, strict=True):
        answer = output.outputs[0]
        assert list(answer.token_ids) == tokens
        for row, entries in zip(rows, answer.logprobs, strict=True):
            got = torch.tensor([entry.logprob for entry in entries.values()])
            torch.testing.assert_close(got, row[list(entries)], rtol=0, atol=1e-4)
    first = outputs[0].outputs[0].logprobs[0]  # the window sees the whole of a short prompt
    got = torch.tensor([entry.logprob for entry in first.values()])
    torch.testing.assert_close(got, stock[list(first)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", STORED)
@pytest.mark.usefixtures("decoder")
def test_a_new_process_goes_on_where_the_old_one_stopped(tmp_path: Path, family: str) -> None:
    small = {"window_size": 8, "sparse_cache_size": 8, "sink_size": 2}
    init_checkpoint(tmp_path / "base", tmp_path / "lola", small)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lola").eval()
    ids = torch.randint(0, 300, (LENGTH + 20,), generator=torch.Generator().manual_seed(2)).tolist()
    prompt, tail = ids[:LENGTH], ids[LENGTH:]
    first, _ = _greedy(model, prompt)
    then, _ = _greedy(model, prompt + first + tail)
    options = {"enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 128}
    for read, wanted, restored in (
        (prompt, first, 0),
        (prompt + first + tail, then, LENGTH + NEW - 1),
    ):
        stored = store_options(tmp_path / "states")
        with engine(tmp_path / "lola", max_num_seqs=8, **options, **stored) as llm:
            tokens, told = ask(llm, read, new=NEW)
        assert tokens == wanted
        assert told["restored_tokens"] == restored


@torch.no_grad()
def _greedy(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """The tokens of a greedy answer, and the log-probabilities `[NEW, vocabulary]` at each."""
    made = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
    rows = model(made[:, :-1]).logits[0, len(prompt) - 1 :].log_softmax(-1)
    return made[0, len(prompt) :].tolist(), rows
