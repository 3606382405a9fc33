"""LoRA adapters at run time: each request gets its own, and no state is shared between them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

from tests.support.engine import GREEDY, engine, generate, metric
from tools.support.tiny import random_prompts

LOLA = {"window_size": 16, "sparse_cache_size": 8}
TARGETS = [f"self_attn.{x}_proj" for x in "qkvo"]
TARGETS += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
RANK, ALPHA, NEW = 4, 8, 24
PROMPTS = random_prompts([5, 40, 100, 130], seed=6)


def make_adapter(base: Path, out: Path, seed: int) -> Path:
    """A random adapter in PEFT's format, and beside it the model that it is merged into."""
    gen = torch.Generator().manual_seed(seed)
    merged, adapter = load_file(base / "model.safetensors"), {}
    for layer in range(2):
        for target in TARGETS:
            name = f"model.layers.{layer}.{target}"
            rows, columns = merged[f"{name}.weight"].shape
            A = torch.randn(RANK, columns, generator=gen) * 0.2
            B = torch.randn(rows, RANK, generator=gen) * 0.2
            adapter[f"base_model.model.{name}.lora_A.weight"] = A
            adapter[f"base_model.model.{name}.lora_B.weight"] = B
            merged[f"{name}.weight"] += ALPHA / RANK * B @ A
    (out / "merged").mkdir(parents=True)
    save_file(adapter, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": RANK,
        "lora_alpha": ALPHA, "target_modules": [t.split(".")[1] for t in TARGETS],
    }  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(base / "config.json", out / "merged")
    save_file(merged, out / "merged" / "model.safetensors")
    return out


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Requests for no adapter and for two, by their place."""
    out = tmp_path_factory.mktemp("adapters")
    made = [make_adapter(tiny, out / str(i), seed=i) for i in (1, 2)]
    return [None, *(LoRARequest(f"a{i}", i, str(path)) for i, path in enumerate(made, start=1))]


@pytest.fixture(scope="module")
def expected(tiny, adapters):
    """Tokens of the base model and of the models with the adapters merged in."""
    models = [tiny, *(Path(a.lora_path) / "merged" for a in adapters[1:])]
    tokens = []
    for model in models:
        with engine(model) as llm:
            tokens.append(generate(llm, PROMPTS, NEW))
    assert tokens[0] != tokens[1] != tokens[2] != tokens[0]
    return tokens


def ask(llm, adapters, which, prompts=PROMPTS, **fields):
    requests = [TokensPrompt(prompt_token_ids=p, **fields) for p in prompts]
    outputs = llm.generate(
        requests,
        SamplingParams(max_tokens=NEW, **GREEDY),
        use_tqdm=False,
        lora_request=[adapters[i] for i in which],
    )
    return [list(o.outputs[0].token_ids) for o in outputs]


# One slot more than adapters: see `refusals.py`.
LORA = {
    "enable_lora": True,
    "max_loras": 3,
    "max_lora_rank": 8,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
}


def test_adapters_answer_as_merged_models_alone_and_mixed(tiny, adapters, expected):
    with engine(tiny, **LORA) as llm:
        for which in ([0] * 4, [1] * 4, [2] * 4, [1, 2, 1, 2], [0, 1, 2, 0], [2, 0, 0, 1]):
            answers = ask(llm, adapters, which)
            assert answers == [expected[a][i] for i, a in enumerate(which)], which


def test_prefix_hits_never_cross_adapters(tiny, adapters, expected):
    with engine(tiny, enable_prefix_caching=True, block_size=32, **LORA) as llm:
        hits = []
        for which in (0, 1, 2, 0, 1, 2):
            before = metric(llm, "vllm:prefix_cache_hits")
            assert ask(llm, adapters, [which] * 4) == expected[which]
            hits.append(metric(llm, "vllm:prefix_cache_hits") - before)
        whole_blocks = sum((len(p) - 1) // 32 * 32 for p in PROMPTS)
        assert hits == [0, 0, 0, whole_blocks, whole_blocks, whole_blocks]


def test_too_few_adapter_slots_on_a_cpu_are_refused(tiny):
    with pytest.raises(Exception, match="--max-loras = 1"), engine(tiny, **LORA | {"max_loras": 1}):
        pass


def test_stored_states_are_of_one_adapter(tiny, adapters):
    """A prompt whose state is stored under one adapter is computed anew under another."""
    (prompt,) = random_prompts([130], seed=8)
    params = SamplingParams(max_tokens=NEW, **GREEDY)
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 3, "max_num_seqs": 8}

    def ask(llm, text, adapter):
        request = TokensPrompt(prompt_token_ids=text)
        (output,) = llm.generate([request], params, use_tqdm=False, lora_request=adapter)
        told = (output.kv_transfer_params or {}).get("lola", {})
        return list(output.outputs[0].token_ids), told.get("restored_tokens")

    with engine(tiny, **options) as llm:
        expected = [ask(llm, [*prompt, 3], adapter)[0] for adapter in adapters]
    store = {"additional_config": {"lola": {"state_ram": "16MiB"}}}
    with engine(tiny, **options, **store) as llm:
        for adapter, answer in zip(adapters, expected, strict=True):
            assert ask(llm, prompt, adapter)[1] == 0
            assert ask(llm, [*prompt, 3], adapter) == (answer, len(prompt))
