"""Stored states belong to what computed them: whatever changes a number changes the fingerprint."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from lola_vllm.core.config import config_class
from lola_vllm.core.state import LayerLayout
from lola_vllm.memory.sessions import fingerprint
from lola_vllm.memory.sessions.fingerprint import (
    adapter_fingerprint,
    model_fingerprint,
    tensor_digest,
)
from lola_vllm.models.files import CheckpointError

LOLA = {"window_size": 32, "sparse_cache_size": 16, "update_interval": 8}
ENDLESS = {**LOLA, "context_shift": 256}
MODEL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with weights in two files' worth of tensors, one of them large."""
    out = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "large": torch.randn(700, 1000, generator=generator),  # 2.7 MiB
        "small": torch.randn(4, 8, generator=generator),
    }
    save_file(tensors, out / "model.safetensors")
    return out


def of(model, fields=None, lola=None, dtype=torch.float32, base="llama", **options):
    """The fingerprint of a model of some config fields."""
    config = config_class(base)(**{**MODEL, **(fields or {})}, lola_config=lola or LOLA)
    layout = LayerLayout.from_config(
        config.lola, config.num_key_value_heads, config.num_attention_heads,
        getattr(config, "head_dim", None) or 8, 8, dtype,
    )  # fmt: skip
    pages = list(layout.pages) * config.num_hidden_layers
    return model_fingerprint(config, str(model), pages, **options)


def rope(**fields):
    """A config's field that says how positions turn keys and queries."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **fields}}


@pytest.mark.parametrize(
    ("part", "kwargs"),
    [
        # What turns keys and queries by their positions.
        ("config", {"fields": rope(rope_theta=500000.0)}),
        ("config", {"fields": rope(rope_type="linear", factor=2.0)}),
        ("config", {"lola": ENDLESS}),
        ("config", {"fields": {"rms_norm_eps": 1e-3}}),
        ("config", {"base": "qwen2"}),
        ("config", {"base": "qwen3"}),
        ("config", {"base": "granite"}),
        ("config", {"lola": {**LOLA, "mixing": "lolcats"}}),
        ("dtype", {"dtype": torch.bfloat16}),
        ("quantization", {"quantization": "fp8"}),
        ("layout", {"lola": {**LOLA, "window_size": 40}}),
        ("layout", {"lola": {**LOLA, "sink_size": 2}}),
        ("ranks", {"tensor_parallel": 2}),
        ("ranks", {"pipeline_parallel": 2}),
    ],
)
def test_every_part_that_changes_a_number_is_told(model, part, kwargs):
    plain, other = of(model, fields=rope()), of(model, **{"fields": rope(), **kwargs})
    assert getattr(plain, part) != getattr(other, part)
    assert plain.key != other.key and plain.difference(plain.to_dict()) is None
    found = plain.difference(other.to_dict())
    assert found is not None and found.startswith("another ")


def test_the_length_of_contexts_counts_where_positions_come_again(model):
    """A context shift moves positions by the trained length; without it a length changes
    nothing."""
    longer = {"max_position_embeddings": 2048}
    assert of(model, lola=ENDLESS) != of(model, longer, lola=ENDLESS)
    assert of(model) == of(model, longer)


def edited(model, out, first, share):
    """A copy whose large tensor is another one from `first` of its bytes on, for a share."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    flat = tensors["large"].view(-1)
    start = int(first * len(flat))
    flat[start : start + int(share * len(flat))] += 1
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("first", [0.0, 0.013, 0.21, 0.503, 0.97])
def test_a_hundredth_of_a_tensor_is_seen_where_pieces_are_read(model, tmp_path, monkeypatch, first):
    other = edited(model, tmp_path / "other", first, 0.01)
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", 0)
    fingerprint._digest_of.cache_clear()
    assert tensor_digest(model) != tensor_digest(other)
    fingerprint._digest_of.cache_clear()


def test_a_single_number_is_seen_in_a_checkpoint_that_is_read_whole(model, tmp_path):
    other = edited(model, tmp_path / "other", 0.4321, 1.5 / 700_000)
    assert tensor_digest(model) != tensor_digest(other)


def test_names_and_shapes_count(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    large, small = tensors["large"], tensors["small"]
    for changed in ({"large": large, "other": small}, {"large": large, "small": small.view(8, 4)}):
        save_file(changed, tmp_path / "model.safetensors")
        assert tensor_digest(tmp_path) != tensor_digest(model)


def test_a_copy_on_another_machine_is_the_same_and_a_change_in_place_is_not(model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy, copy_function=shutil.copy)  # with times of now
    path = copy / "model.safetensors"
    before = path.stat()
    assert tensor_digest(copy) == tensor_digest(model)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    time.sleep(0.02)  # a file system's clock has ticks
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` would
    assert tensor_digest(copy) != tensor_digest(model)


@pytest.fixture
def adapter(tmp_path):
    """A LoRA adapter as PEFT writes it."""
    out = tmp_path / "adapter"
    out.mkdir()
    save_file({"a.lora_A.weight": torch.ones(2, 8)}, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def test_an_adapter_is_its_weights_and_how_they_are_applied(adapter, tmp_path):
    plain = adapter_fingerprint("a", str(adapter))
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    assert adapter_fingerprint("a", str(copy)) == plain
    assert adapter_fingerprint("b", str(copy)) != plain
    path = copy / "adapter_config.json"
    config = json.loads(path.read_text())
    for name, value in (("lora_alpha", 8), ("use_rslora", True), ("target_modules", ["k_proj"])):
        path.write_text(json.dumps({**config, name: value}, indent=1))
        assert adapter_fingerprint("a", str(copy)) != plain, name
    path.write_text(json.dumps(config, indent=3, sort_keys=True))  # the same in another order
    assert adapter_fingerprint("a", str(copy)) == plain
    save_file({"a.lora_A.weight": torch.zeros(2, 8)}, copy / "adapter_model.safetensors")
    assert adapter_fingerprint("a", str(copy)) != plain


@pytest.mark.parametrize("text", [None, "{", "\xff"])
def test_an_adapter_whose_config_cannot_be_read_is_refused(adapter, text):
    path = adapter / "adapter_config.json"
    path.unlink() if text is None else path.write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        adapter_fingerprint("a", str(adapter))
