"""Quantized linears are vLLM's own: around them LoLA computes what it does around plain ones.

With a window above the sequence length LoLA is full attention, so a quantized LoLA checkpoint must
give the log-probabilities of the stock Llama that is quantized in the same way.
"""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

from lola_vllm.models.quantize import quantize_checkpoint
from tests.support.engine import engine, prompt_logprobs
from tools.support.tiny import make_tiny, random_prompts

LOLA = {"window_size": 16, "sparse_cache_size": 8}
WIDE = {"hf_overrides": {"lola_config": {"window_size": 256}}}
PROMPTS = random_prompts([5, 60, 150], seed=4)
GROUP = 32  # weights that share a scale, for 4 bits
CAPABLE = torch.cpu.get_capabilities()
needs_int4 = pytest.mark.skipif(
    not CAPABLE.get("avx512_f"), reason="vLLM has a 4-bit kernel for processors with AVX-512 alone"
)


def int8(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One scale per row; returns the tensors, and the weights that they stand for."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    packed = (weight / scale).round()
    return {name: packed.to(torch.int8), f"{name}_scale": scale}, packed * scale


def int4(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One scale per group of a row, eight values in an int32."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    values = (groups / scale).round().clamp(-8, 7)
    shifts = 4 * torch.arange(8)
    words = ((values.flatten(1).long() + 8).unflatten(1, (-1, 8)) << shifts).sum(-1)
    packed = torch.where(words >= 2**31, words - 2**32, words).int()
    tensors = {
        f"{name}_packed": packed,
        f"{name}_scale": scale.squeeze(-1),
        f"{name}_shape": torch.tensor(weight.shape),
    }
    return tensors, (values * scale).flatten(1)


WEIGHTS = {"type": "int", "symmetric": True, "dynamic": False}
FORMATS = {
    "int-quantized": {
        "weights": {**WEIGHTS, "num_bits": 8, "strategy": "channel"},
        "input_activations": {
            "type": "int", "symmetric": True, "dynamic": True, "num_bits": 8, "strategy": "token",
        },
    },
    "pack-quantized": {
        "weights": {**WEIGHTS, "num_bits": 4, "strategy": "group", "group_size": GROUP},
    },
}  # fmt: skip


def quantize(source: Path, out: Path, method: str | None, change=None) -> Path:
    """A compressed-tensors checkpoint, or with no method the plain one of the int4 values."""
    pack = int8 if method == "int-quantized" else int4
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            packed, dense = pack(name, tensor)
            tensors |= packed if method else {name: dense}
        else:
            tensors[name] = tensor
    if change:
        change(tensors)
    config = json.loads((source / "config.json").read_text())
    if method:
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": method,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], **FORMATS[method]}},
        }
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    return out


def make_stock(lola: Path, out: Path) -> Path:
    """The plain Llama inside a LoLA checkpoint."""
    maps = ("feature_map_q", "feature_map_k", "window_factors")
    tensors = load_file(lola / "model.safetensors")
    config = json.loads((lola / "config.json").read_text())
    del config["lola_config"]
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file({k: t for k, t in tensors.items() if not k.endswith(maps)}, out / "model.safetensors")
    return out


def logprobs(model: Path, **options) -> Tensor:
    with engine(model, dtype="bfloat16", **options) as llm:
        return torch.tensor([p for row in prompt_logprobs(llm, PROMPTS)[1] for p in row])


@pytest.fixture
def tiny(tmp_path):
    return make_tiny(tmp_path / "tiny", LOLA, head_dim=32)  # stock CPU attention has no 16


@pytest.mark.parametrize(
    "method", ["int-quantized", pytest.param("pack-quantized", marks=needs_int4)]
)
def test_a_wide_window_gives_the_quantized_stock_model(tmp_path, tiny, method):
    lola = logprobs(quantize(tiny, tmp_path / "lola", method), **WIDE)
    stock_model = quantize(make_stock(tiny, tmp_path / "stock"), tmp_path / "quantized", method)
    stock = logprobs(stock_model)
    plain = logprobs(tiny, **WIDE)
    # bfloat16 rounds the two attentions differently, most on processors with AMX; quantizing moves
    # all of them further.
    difference = (lola - stock).abs()
    assert difference.mean() < 0.05
    assert difference.mean() < (lola - plain).abs().mean()


@needs_int4
def test_four_bits_with_a_small_window_are_the_weights_they_stand_for(tmp_path, tiny):
    packed = logprobs(quantize(tiny, tmp_path / "packed", "pack-quantized"))
    dense = logprobs(quantize(tiny, tmp_path / "dense", None))
    assert (packed - dense).abs().mean() < 0.05


def stands_for(quantized: Path, plain: Path, out: Path) -> Path:
    """The plain checkpoint with the weights that a quantized one stands for."""
    stored = load_file(quantized / "model.safetensors")
    tensors = load_file(plain / "model.safetensors")
    for name in tensors:
        if f"{name}_packed" in stored:
            shape = torch.Size(stored[f"{name}_shape"].tolist())
            values = unpack_from_int32(stored[f"{name}_packed"], 4, shape)
            scale = stored[f"{name}_scale"].repeat_interleave(GROUP, 1)
            tensors[name] = values.float() * scale.float()
        elif f"{name}_scale" in stored:
            tensors[name] = stored[name].float() * stored[f"{name}_scale"]
    out.mkdir()
    (out / "config.json").write_text((plain / "config.json").read_text())
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize(
    ("weights", "tolerance"),
    [
        # Without VNNI, sums of two products of 8 bits saturate at 16.
        ("int8", 0.15 if CAPABLE.get("avx512_vnni") else 0.5),
        pytest.param("int4", 0.15, marks=needs_int4),
    ],
)
def test_quantize_checkpoint_writes_what_vllm_reads(tmp_path, tiny, weights, tolerance):
    quantize_checkpoint(tiny, tmp_path / weights, weights)
    packed = logprobs(tmp_path / weights)
    dense = logprobs(stands_for(tmp_path / weights, tiny, tmp_path / "dense"))
    # What is left is activations in 8 bits, of all layers or of the output matrix alone; with AMX
    # those of 4-bit layers have 8 bits as well.
    assert (packed - dense).abs().mean() < tolerance
    assert (packed - dense.roll(1)).abs().mean() > 1  # so that the bound says something


LAYER = "model.layers.1.mlp.down_proj"
MAP = "model.layers.0.self_attn.feature_map_q"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: [t.pop(k) for k in list(t) if k.startswith(LAYER)], [LAYER, "missing"]),
        (lambda t: t.pop("model.norm.weight"), ["model.norm.weight", "missing"]),
        (lambda t: t.pop(MAP), [MAP, "missing"]),
        (lambda t: t[f"{LAYER}.weight_scale"].fill_(torch.inf), [LAYER, "not finite"]),
    ],
    ids=["no-layer", "no-norm", "no-map", "infinite-scale"],
)
def test_a_wrong_quantized_checkpoint_names_the_tensor(tmp_path, tiny, change, words):
    model = quantize(tiny, tmp_path / "wrong", "int-quantized", change)
    with pytest.raises(Exception) as error, engine(model):
        pass
    for word in words:
        assert word in str(error.value)
