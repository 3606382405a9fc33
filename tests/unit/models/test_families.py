"""Decoders of any family as bases: what becomes of their files, and why some cannot be one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import lola_vllm.engine.hf  # noqa: F401  (makes transformers know LoLA models)
from lola_vllm.core.config import DecoderConfig, config_class
from lola_vllm.core.lola_config import LolaConfigError
from lola_vllm.engine.estimate import estimate
from lola_vllm.engine.hf import LolaCache
from lola_vllm.models import CheckpointError, expected_tensors
from lola_vllm.models.base import lola_fields
from lola_vllm.models.convert import convert_checkpoint
from lola_vllm.models.families import check_base
from lola_vllm.models.init import init_checkpoint
from lola_vllm.models.rope import _apply, angles
from tests.support.families import FAMILIES, OTHERS, make_base
from tests.support.lolcats_files import distill_tensors, lora_tensors, save

PATH = Path("base/config.json")


@pytest.fixture(scope="module", params=[*FAMILIES, *OTHERS])
def both(request, tmp_path_factory) -> tuple[PreTrainedModel, Path]:
    """A base of each family, and the directory of a LoLA model of it whose contexts shift."""
    out = tmp_path_factory.mktemp(request.param)
    base = make_base(out / "base", request.param, max_position_embeddings=128)
    small = {"window_size": 8, "sparse_cache_size": 8, "sink_size": 2}
    init_checkpoint(out / "base", out / "lola", small)
    return base, out / "lola"


def test_no_field_and_no_tensor_of_the_base_is_lost(both):
    lola, base = both[1], both[1].with_name("base")
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, lola))
    same = set(before) - {"model_type", "architectures"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    assert (after["model_type"], after["base_model_type"]) == ("lola", before["model_type"])
    old, new = (load_file(path / "model.safetensors") for path in (base, lola))
    assert old.keys() < new.keys()
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    assert estimate(base).config.facts == estimate(lola).config.facts


@torch.no_grad()
def test_a_window_longer_than_the_text_gives_the_base(both):
    base, directory = both
    wide = DecoderConfig.from_pretrained(directory)
    wide.lola_config = {"window_size": 100, "update_interval": 8}
    model = AutoModelForCausalLM.from_pretrained(directory, config=wide).eval()
    ids = torch.randint(0, 300, (2, 70), generator=torch.Generator().manual_seed(0))
    wanted = base(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_folds_and_shifts_do_not_depend_on_how_a_text_is_split(both):
    """Past two context shifts; within the trained length pages and whole sequences agree."""
    model = AutoModelForCausalLM.from_pretrained(both[1]).eval()
    ids = torch.randint(0, 300, (1, 180), generator=torch.Generator().manual_seed(1))
    cache, pieces = LolaCache(model.config), []
    for piece in ids.split([1, 70, 30, 79], dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    at_once = LolaCache(model.config)
    whole = model(ids, past_key_values=at_once).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)
    plain = model(ids[:, :120], use_cache=False).logits
    torch.testing.assert_close(whole[:, :120], plain, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_shift_moves_keys_to_where_rope_would_have_put_them(both):
    """The keys of the window, after the first shift: RoPE of D positions less, by the decoder."""
    model = AutoModelForCausalLM.from_pretrained(both[1]).eval()
    rotary, rotations = model.model.rotary_emb, model.key_rotations(torch.device("cpu"))
    k = torch.randn(1, 16)

    def turned(attention: Any, position: int) -> torch.Tensor:
        order, R = attention.lola_order, attention.lola_order.width
        if R == 0:
            return order(k)
        cos, sin = angles(attention, rotary, torch.tensor([position]), torch.float32)
        return order(torch.cat([_apply(attention, k[:, :R], cos, sin), k[:, R:]], dim=1))

    for layer, rotation in zip(model.model.layers, rotations, strict=True):
        moved = rotation.rotate_back(turned(layer.self_attn, 40))
        wanted = turned(layer.self_attn, 8)
        torch.testing.assert_close(moved, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "granite"])
def test_convert_merges_into_every_family(tmp_path, family):
    """Biases and norms stay, and the linears get what a LoRA file says."""
    stock = make_base(tmp_path / "base", family)
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
    shapes = {name: tuple(t.shape) for name, t in written.items()}
    assert expected_tensors(config).items() <= shapes.items()
    for name, tensor in stock.state_dict().items():
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
        ("phi", {"num_key_value_heads": 64, "head_dim": 32}),
    ],
)
def test_what_a_file_leaves_out_is_the_familys_default(family, defaults):
    raw = {"model_type": family, "sliding_window": None, "num_attention_heads": 64}
    check_base(PATH, raw)
    config = DecoderConfig.from_dict(lola_fields(raw))
    assert {key: getattr(config, key) for key in defaults} == defaults
    assert config.num_attention_heads == 64


def test_the_page_names_the_families_that_are_tested():
    page = (Path(__file__).parents[3] / "docs/checkpoints.md").read_text()
    _, section = page.split("\n## Bases\n")
    rows = re.findall(r"^\| .*? \| (`.*`) \|$", section.split("\n## ")[0], re.MULTILINE)
    llamas, others, experts, sliding = (re.findall(r"`(.*?)`", row) for row in rows)
    assert llamas == list(FAMILIES)
    assert sorted(others + experts + sliding) == sorted(OTHERS)
    assert all("layer_types" in OTHERS[family] for family in sliding)
    assert all(any("experts" in key for key in OTHERS[family]) for family in experts)


@pytest.mark.parametrize(
    ("old", "base"),
    [
        ({}, "llama"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"attention_bias": True, "qkv_bias": True}, "llama"),
    ],
)
def test_files_of_before_other_families_load_as_they_are(old, base):
    raw = {"model_type": "lola_llama", "rope_theta": 1e6, "lola_config": {"sink_size": 4}, **old}
    config = DecoderConfig.from_dict(raw)
    assert (config.model_type, config.base_model_type, config.lola.sink_size) == ("lola", base, 4)
    assert config.rope_parameters["rope_theta"] == 1e6


def test_a_base_that_transformers_does_not_know_is_named():
    with pytest.raises(LolaConfigError, match="base_model_type = 'of-next-year'"):
        config_class("of-next-year")


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, r"sliding_window = 4096.*to null"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0},
            "use_sliding_window to false",
        ),
        ({"model_type": "gemma2"}, "caps the logits"),
        ({"model_type": "gemma3", "vision_config": {}}, "reads more than text"),
        ({"model_type": "deepseek_v3"}, "latent attention"),
        ({"model_type": "mamba2"}, "linear_attention|no decoder layers"),
        ({"model_type": "t5"}, "has an encoder"),
        ({"model_type": "lola"}, "a LoLA model already"),
        ({"model_type": "of-next-year"}, "knows no such model"),
        ({}, "config.json has no model_type"),
        ({"model_type": "qwen3", "hidden_size": "wide"}, "hidden_size"),
    ],
    ids=lambda value: str(value.get("model_type")) if isinstance(value, dict) else "",
)
def test_one_sentence_says_why_a_base_cannot_be(raw, why):
    with pytest.raises(CheckpointError, match=f"base/config.json: .*(?:{why})"):
        check_base(PATH, raw)


def test_windows_that_no_layer_uses_are_no_obstacle():
    """Qwen's switch may be on while its first windowed layer lies beyond the last."""
    raw = {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 28}
    check_base(PATH, {**raw, "num_hidden_layers": 28})
