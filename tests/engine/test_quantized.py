"""Quantized linears: around them LoLA computes what it does around plain ones.

With a window above the sequence length LoLA is full attention, so a quantized LoLA checkpoint must
give the log-probabilities of the stock Llama that is quantized in the same way.
"""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

from lola_vllm.models.quantize import quantize_checkpoint
from tests.support.engine import assert_refused, engine, prompt_logprobs
from tools.support.tiny import make_tiny, random_prompts

LOLA = {"window_size": 16, "sparse_cache_size": 8}
PROMPTS = random_prompts([5, 60, 150], seed=4)
CAPABLE = torch.cpu.get_capabilities()
needs_int4 = pytest.mark.skipif(
    not CAPABLE.get("avx512_f"), reason="vLLM has a 4-bit kernel for processors with AVX-512 alone"
)


def logprobs(model: Path, **options) -> Tensor:
    with engine(model, dtype="bfloat16", **options) as llm:
        return torch.tensor([p for row in prompt_logprobs(llm, PROMPTS)[1] for p in row])


@pytest.fixture
def tiny(tmp_path):
    return make_tiny(tmp_path / "tiny", LOLA, head_dim=32)  # stock CPU attention has no 16


def stands_for(quantized: Path, plain: Path, out: Path) -> Path:
    """The plain checkpoint with the weights that a quantized one stands for."""
    stored = load_file(quantized / "model.safetensors")
    tensors = load_file(plain / "model.safetensors")
    for name in tensors:
        if f"{name}_packed" in stored:
            shape = torch.Size(stored[f"{name}_shape"].tolist())
            packed = stored[f"{name}_packed"]
            values = unpack_from_int32(packed, 32 * packed.shape[1] // shape[1], shape)
            scale = stored[f"{name}_scale"]
            scale = scale.repeat_interleave(shape[1] // scale.shape[1], 1)
            tensors[name] = values.float() * scale.float()
    out.mkdir()
    (out / "config.json").write_text((plain / "config.json").read_text())
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("weights", ["int8", pytest.param("int4", marks=needs_int4)])
def test_quantize_checkpoint_writes_what_vllm_reads(tmp_path, tiny, weights):
    quantize_checkpoint(tiny, tmp_path / weights, weights)
    packed = logprobs(tmp_path / weights)
    dense = logprobs(stands_for(tmp_path / weights, tiny, tmp_path / "dense"))
    # What is left is rounding; with AMX activations of 4-bit layers have 8 bits as well.
    assert (packed - dense).abs().mean() < 0.15
    assert (packed - dense.roll(1)).abs().mean() > 1  # so that the bound says something


LAYER = "model.layers.1.mlp.down_proj"


def test_a_wrong_quantized_checkpoint_names_the_tensor(tmp_path, tiny):
    model = tmp_path / "wrong"
    quantize_checkpoint(tiny, model, "int8")
    tensors = load_file(model / "model.safetensors")
    tensors[f"{LAYER}.weight_scale"].fill_(torch.inf)
    save_file(tensors, model / "model.safetensors")
    assert_refused(model, f"{LAYER}.*not finite")
