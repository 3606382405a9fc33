"""Checkpoints in 8 and 4 bits: what is stored stands for the weights it was made from."""

import json

import pytest
import torch
from compressed_tensors.compressors import unpack_from_int32
from safetensors.torch import load_file, save_file

from lola_vllm.command.cli import main
from lola_vllm.models import CheckpointError
from lola_vllm.models.quantize import GROUP_SIZE, quantize_checkpoint

LAYER = "model.layers.0.mlp.down_proj.weight"
MAP = "model.layers.0.self_attn.feature_map_q"
EMBEDDING = "model.embed_tokens.weight"


def make(path, tied=True, columns=96, sharded=False):
    torch.manual_seed(0)
    tensors = {
        EMBEDDING: torch.randn(50, 96).bfloat16(),
        LAYER: torch.randn(64, columns).bfloat16() * torch.logspace(-3, 1, 64)[:, None].bfloat16(),
        MAP: torch.randn(3, 8, 8).bfloat16(),
        "model.norm.weight": torch.ones(96).bfloat16(),
    }
    if not tied:
        tensors["lm_head.weight"] = torch.randn(50, 96).bfloat16()
    path.mkdir()
    config = {"model_type": "lola_llama", "tie_word_embeddings": tied}
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "README.md", "modeling_lola.py"):
        (path / name).write_text("{}")
    if sharded:
        names = {name: f"part-{i}.safetensors" for i, name in enumerate(tensors)}
        for name, file in names.items():
            save_file({name: tensors[name]}, path / file)
        index = {"metadata": {}, "weight_map": names}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, path / "model.safetensors")
    return tensors


def dense(tensors, name, bits):
    """The weights that stored tensors stand for, by compressed-tensors' own unpacking."""
    shape = torch.Size(tensors[f"{name}_shape"].tolist())
    values = unpack_from_int32(tensors[f"{name}_packed"], bits, shape).float()
    scale = tensors[f"{name}_scale"].float()
    return (values.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


@pytest.mark.parametrize(("weights", "bits", "levels"), [("int8", 8, 127), ("int4", 4, 8)])
@pytest.mark.parametrize("tied", [True, False])
def test_stored_weights_are_the_nearest(tmp_path, weights, bits, levels, tied):
    before = make(tmp_path / "in", tied)
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", weights)
    after = load_file(tmp_path / "out" / "model.safetensors")
    group = GROUP_SIZE if weights == "int4" else 96
    error = (dense(after, LAYER, bits) - before[LAYER].float()).unflatten(1, (-1, group))
    largest = before[LAYER].float().unflatten(1, (-1, group)).abs().amax(-1)
    # Half a step for values in the grid, a little more where clipping a few makes all others finer.
    assert (error.square().mean(-1).sqrt() <= 0.5 * largest / levels).all()
    head = before[EMBEDDING if tied else "lm_head.weight"].float()
    error = dense(after, "lm_head.weight", 8) - head
    assert (error.abs() <= 0.52 * head.abs().amax(1, keepdim=True) / 127).all()
    for name in (EMBEDDING, MAP, "model.norm.weight"):
        assert after[name].equal(before[name])


def test_a_group_of_zeros_stays_one(tmp_path):
    tensors = make(tmp_path / "in")
    tensors[LAYER].zero_()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    for weights, bits in (("int8", 8), ("int4", 4)):
        quantize_checkpoint(tmp_path / "in", tmp_path / weights, weights)
        after = dense(load_file(tmp_path / weights / "model.safetensors"), LAYER, bits)
        assert after.equal(torch.zeros(64, 96))


def test_files_and_config(tmp_path):
    before = make(tmp_path / "in", sharded=True)
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", "int4")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert {f"{LAYER}_packed", "lm_head.weight_scale", MAP} <= index["weight_map"].keys()
    assert LAYER in before and LAYER not in index["weight_map"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "lola_llama"
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    for name in ("tokenizer.json", "README.md", "modeling_lola.py"):
        assert (tmp_path / "out" / name).read_text() == "{}"


def test_the_command_writes_int8(tmp_path):
    make(tmp_path / "in")
    command = ["quantize", "--model", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found[f"{LAYER}_packed"].shape == (64, 96 // 4)


def test_what_cannot_be_quantized_is_refused(tmp_path):
    make(tmp_path / "odd", columns=40)
    with pytest.raises(CheckpointError, match=rf"{LAYER}: rows of 40 .* groups of 32; use int8"):
        quantize_checkpoint(tmp_path / "odd", tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()
    make(tmp_path / "odder", columns=42)
    with pytest.raises(CheckpointError, match=rf"{LAYER}: rows of 42 do not fill words of 4"):
        quantize_checkpoint(tmp_path / "odder", tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="weights = 'int2': must be"):
        quantize_checkpoint(tmp_path / "odd", tmp_path / "out", "int2")
    quantize_checkpoint(tmp_path / "odd", tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="out: quantized already"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", "int8")
    other = {"model_type": "lola", "base_model_type": "granite"}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match=r"a model of type 'granite': .*llm-compressor"):
        quantize_checkpoint(tmp_path / "odd", tmp_path / "again", "int8")
