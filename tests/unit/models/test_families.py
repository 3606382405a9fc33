"""Bases that are no Llama: what their config.json becomes, which tensors there are, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lola_vllm.core.config import LolaConfigError, LolaLlamaConfig
from lola_vllm.engine.estimate import estimate
from lola_vllm.models import CheckpointError, check_tensors, expected_tensors
from lola_vllm.models.convert import convert_checkpoint
from lola_vllm.models.families import BASE_MODEL_TYPES, llama_fields
from lola_vllm.models.files import read_shapes
from lola_vllm.models.init import init_checkpoint
from tests.support.families import FAMILIES, make_base
from tests.support.lolcats_files import distill_tensors, lora_tensors, save

PATH = Path("base/config.json")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_schema_is_the_stock_model_and_its_maps(
    tmp_path: Path, family: str, tied: bool
) -> None:
    stock = make_base(tmp_path / "base", family, tie_word_embeddings=tied).state_dict()
    config = init_checkpoint(tmp_path / "base", tmp_path / "lola", {})
    assert (config.qkv_bias, config.qk_norm) == (family == "qwen2", family == "qwen3")
    written = load_file(tmp_path / "lola" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in written.items()} == expected_tensors(config)
    assert ("lm_head.weight" in written) != tied
    for name, tensor in written.items():
        if name in stock:
            assert torch.equal(tensor, stock.pop(name))
    assert set(stock) == ({"lm_head.weight"} if tied else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_of_the_base_is_lost_but_those_of_sliding_windows(
    tmp_path: Path, family: str
) -> None:
    make_base(tmp_path / "base", family)
    init_checkpoint(tmp_path / "base", tmp_path / "lola", {})
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "lola")
    )
    gone = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
    assert {key for key in before if key not in after} <= gone
    assert not gone & set(after)
    same = set(before) - gone - {"model_type", "architectures"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_convert_merges_into_every_family(tmp_path: Path, family: str) -> None:
    """Biases and norms stay, and the linears get what a LoRA file says."""
    stock = make_base(tmp_path / "base", family).state_dict()
    rows = {"q_proj": (64, 64), "v_proj": (32, 64)}
    adapters = lora_tensors(rows=rows, r=4)
    config = convert_checkpoint(
        tmp_path / "base",
        save(tmp_path / "distill.pt", distill_tensors(d=16, Hs=2)),
        tmp_path / "lola",
        {},
        save(tmp_path / "lora.pt", adapters),
    )
    written = load_file(tmp_path / "lola" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in written.items()} == expected_tensors(config)
    for name, tensor in stock.items():
        linear = name.split(".")[-2]
        if linear in rows and name.endswith("weight"):
            prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            A, B = (adapters[f"{prefix}{x}.default.weight"].float() for x in "AB")
            tensor = tensor + 2 * (B @ A)  # alpha is twice the rank
        torch.testing.assert_close(written[name], tensor)


@pytest.mark.parametrize(
    ("family", "defaults"),
    [
        ("mistral", {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32}),
        ("qwen2", {"num_key_value_heads": 32, "max_position_embeddings": 32768}),
        ("qwen3", {"head_dim": 128, "eos_token_id": None}),
    ],
)
def test_what_a_file_leaves_out_is_the_familys_default(
    family: str, defaults: dict[str, object]
) -> None:
    raw = {"model_type": family, "sliding_window": None, "num_attention_heads": 64}
    fields = llama_fields(PATH, raw)
    config = LolaLlamaConfig.from_dict({**fields, "model_type": "lola_llama"})
    assert {key: getattr(config, key) for key in defaults} == defaults
    assert config.num_attention_heads == 64


def test_rope_of_old_files_is_kept() -> None:
    fields = llama_fields(PATH, {"model_type": "qwen2", "rope_theta": 1e6})
    config = LolaLlamaConfig.from_dict({**fields, "model_type": "lola_llama"})
    assert config.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window = 4096: .*to null"),
        ({"model_type": "mistral"}, r"sliding_window = 4096 \(the default\)"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3},
            "sliding_window = 4096: .*use_sliding_window to false",
        ),
        (
            {"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "sliding_window = None: .*sees? a window only",
        ),
        ({"model_type": "qwen3", "hidden_size": "wide"}, "base/config.json: .*hidden_size"),
        ({"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported; supported: llama, mistral"),
        ({}, "model_type None is not supported"),
    ],
)
def test_bases_that_cannot_be_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        llama_fields(PATH, raw)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"model_type": "lola_llama"}, "a LoLA model already"),
        ({"model_type": "gemma"}, "Gemma scales its embeddings"),
        ({"model_type": "gemma3_text"}, "from Gemma 2 on with sliding windows"),
        ({"model_type": "gemma3", "vision_config": {}}, "Gemma scales its embeddings"),
        ({"model_type": "phi"}, "LayerNorm where a Llama has RMSNorm"),
        ({"model_type": "phi3"}, "several matrices in one tensor"),
        ({"model_type": "qwen3_moe"}, "choose among experts"),
        ({"model_type": "mixtral"}, "choose among experts"),
        ({"model_type": "deepseek_v3"}, "latent attention"),
        ({"model_type": "qwen3_next"}, "recurrent already"),
        ({"model_type": "mamba2"}, "recurrent already"),
        ({"model_type": "gpt2"}, "no RoPE"),
        ({"model_type": "smollm3"}, "no RoPE; SmolLM2, which is a Llama, works"),
        ({"model_type": "olmo2"}, "norms come after"),
        ({"model_type": "granite"}, "scales embeddings"),
        ({"model_type": "qwen2_5_vl", "vision_config": {}}, "reads more than text"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "has an encoder"),
        ({"model_type": "of-next-year"}, "not known to be a Llama's"),
        ({"model_type": 3}, "config.json has no model_type"),
        ({}, "config.json has no model_type"),
    ],
    ids=lambda value: str(value.get("model_type")) if isinstance(value, dict) else "",
)
def test_one_sentence_says_why_and_what_is_nearest(raw: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError) as error:
        llama_fields(PATH, raw)
    sentence = str(error.value).partition("supported: llama, mistral, qwen2, qwen3. ")[2]
    assert why in sentence and sentence.count(".") == 1 + sentence.count("config.json")
    assert raw.get("model_type") in (None, 3) or " works" in sentence


def test_windows_that_no_layer_uses_are_no_obstacle() -> None:
    """Qwen's switch may be on while its first windowed layer lies beyond the last."""
    raw = {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 28}
    assert "sliding_window" not in llama_fields(PATH, {**raw, "num_hidden_layers": 28})


def test_biases_and_norms_that_the_config_denies_are_named(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "qwen3")
    config = init_checkpoint(tmp_path / "base", tmp_path / "lola", {})
    found = read_shapes(tmp_path / "lola")
    config.qk_norm, config.qkv_bias = False, True
    with pytest.raises(CheckpointError) as error:
        check_tensors(expected_tensors(config), found)
    assert "self_attn.q_norm.weight; set qk_norm to true" in str(error.value)
    assert "self_attn.v_proj.bias [32]; set qkv_bias to false" in str(error.value)


@pytest.mark.parametrize("field", ["qkv_bias", "qk_norm"])
def test_switches_must_be_booleans(field: str) -> None:
    with pytest.raises(LolaConfigError, match=f"{field} = 'yes': must be true or false"):
        LolaLlamaConfig(**{field: "yes"})


def test_qkv_bias_follows_attention_bias_unless_it_is_given() -> None:
    assert LolaLlamaConfig(attention_bias=True).qkv_bias is True
    assert LolaLlamaConfig(attention_bias=True, qkv_bias=False).qkv_bias is False
    assert LolaLlamaConfig().qkv_bias is False


@pytest.mark.parametrize("family", BASE_MODEL_TYPES)
def test_estimate_takes_every_family(tmp_path: Path, family: str) -> None:
    make_base(tmp_path, family)
    assert estimate(tmp_path, {}).config.head_dim == 16
