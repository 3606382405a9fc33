"""What the CPU multiplies fast, and how many sequences fit in the memory of a machine."""

import pytest

from lola_vllm.core import cpu
from lola_vllm.core.cpu import bfloat16_flag, preferred_dtype
from lola_vllm.core.sizing import Pool, weight_bytes

AVX2 = "flags\t\t: fpu sse2 avx2 fma\n"
ZEN4 = "flags\t\t: fpu sse2 avx2 fma avx512f avx512_bf16\n"
SAPPHIRE = "flags\t\t: avx512_bf16 amx_bf16 amx_tile\n"
ARM = "BogoMIPS\t: 243.75\nFeatures\t: fp asimd bf16 i8mm\n"
ARM_WITHOUT = "Features\t: fp asimd\n"
POWER = "processor : 0\ncpu : POWER10\n"


def isa(name):
    return {"LOLA_VLLM_CPU_ISA": name}


@pytest.mark.parametrize(
    ("text", "env", "flag", "dtype"),
    [
        (AVX2, {}, None, "float32"),
        (ZEN4, {}, "avx512_bf16", "bfloat16"),
        (SAPPHIRE, {}, "amx_bf16", "bfloat16"),
        (ARM, {}, "bf16", "bfloat16"),
        (ARM_WITHOUT, {}, None, "float32"),
        (POWER, {}, None, None),
        # A lesser CPU can be asked for, a better one cannot.
        *((SAPPHIRE, isa(name), None, "float32") for name in ("baseline", "avx2", "avx512")),
        (SAPPHIRE, isa("avx512_bf16"), "amx_bf16", "bfloat16"),
        (AVX2, isa("avx512_bf16"), None, "float32"),
        (None, {}, None, None),  # a system that does not tell
    ],
)
def test_the_dtype_follows_the_instructions(tmp_path, monkeypatch, text, env, flag, dtype):
    path = tmp_path / "cpuinfo"
    if text:
        path.write_text(f"processor\t: 0\n{text}")
    monkeypatch.setattr(cpu, "CPUINFO", path)
    assert bfloat16_flag(env) == flag
    assert preferred_dtype({}, env) == dtype
    # That of quantized weights is left to vLLM.
    assert preferred_dtype({"quantization_config": {"quant_method": "gptq"}}, env) is None


def test_weights_grow_with_the_dtype():
    assert weight_bytes(100, {"dtype": "bfloat16"}, "float32") == 200
    assert weight_bytes(100, {"torch_dtype": "float32"}, "bfloat16") == 50
    assert weight_bytes(100, {"dtype": "bfloat16"}, "float16") == 100
    assert weight_bytes(100, {}, "float32") == 100
    quantized = {"dtype": "bfloat16", "quantization_config": {}}
    assert weight_bytes(100, quantized, "float32") == 100


@pytest.mark.parametrize(
    ("device", "caching", "states"),
    [("cpu", True, 3), ("cuda", True, 2), ("cpu", False, 1), ("cuda", False, 1)],
)
def test_sequences_that_fit_in_a_pool_take_no_more_than_its_bytes(device, caching, states):
    pool = Pool.of(1000, device, caching)
    assert pool.per_sequence == states
    assert pool.bytes_for(5) == (5 * states + 1) * 1000
    for spare in (0, states * 1000 - 1):
        assert pool.sequences_in(pool.bytes_for(5) + spare) == 5
    assert pool.sequences_in(pool.bytes_for(5) - 1) == 4
    assert pool.sequences_in(pool.bytes_for(1) - 1) < 1 and pool.sequences_in(0) < 1
