"""What the CPU multiplies fast, and how much of its memory states may take."""

import pytest

from lola_vllm import cpu
from lola_vllm.cpu import GIB, bfloat16_flag, preferred_dtype, room_for_states, weight_bytes

AVX2 = "flags\t\t: fpu sse2 avx2 fma\n"
ZEN4 = "flags\t\t: fpu sse2 avx2 fma avx512f avx512_bf16\n"
SAPPHIRE = "flags\t\t: avx512_bf16 amx_bf16 amx_tile\n"
ARM = "BogoMIPS\t: 243.75\nFeatures\t: fp asimd bf16 i8mm\n"
ARM_WITHOUT = "Features\t: fp asimd\n"
POWER = "processor : 0\ncpu : POWER10\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Be a machine whose /proc/cpuinfo is this text."""

    def be(text):
        path = tmp_path / "cpuinfo"
        path.write_text(f"processor\t: 0\n{text}")
        monkeypatch.setattr(cpu, "CPUINFO", path)

    return be


@pytest.mark.parametrize(
    ("text", "flag", "dtype"),
    [
        (AVX2, None, "float32"),
        (ZEN4, "avx512_bf16", "bfloat16"),
        (SAPPHIRE, "amx_bf16", "bfloat16"),
        (ARM, "bf16", "bfloat16"),
        (ARM_WITHOUT, None, "float32"),
        (POWER, None, None),
    ],
    ids=["avx2", "zen4", "sapphire", "arm", "arm-without", "power"],
)
def test_the_dtype_follows_the_instructions(machine, text, flag, dtype):
    machine(text)
    assert bfloat16_flag({}) == flag
    assert preferred_dtype({}, {}) == dtype


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_a_lesser_cpu_can_be_asked_for(machine, isa):
    machine(SAPPHIRE)
    assert preferred_dtype({}, {"LOLA_VLLM_CPU_ISA": isa}) == "float32"
    assert preferred_dtype({}, {"LOLA_VLLM_CPU_ISA": "avx512_bf16"}) == "bfloat16"


def test_a_better_cpu_cannot_be_asked_for(machine):
    machine(AVX2)
    assert preferred_dtype({}, {"LOLA_VLLM_CPU_ISA": "avx512_bf16"}) == "float32"


def test_the_dtype_of_quantized_weights_is_left_to_vllm(machine):
    machine(AVX2)
    assert preferred_dtype({"quantization_config": {"quant_method": "gptq"}}, {}) is None


def test_a_system_that_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "nothing")
    assert bfloat16_flag({}) is None
    assert preferred_dtype({}, {}) is None


def test_weights_grow_with_the_dtype():
    assert weight_bytes(100, {"dtype": "bfloat16"}, "float32") == 200
    assert weight_bytes(100, {"torch_dtype": "float32"}, "bfloat16") == 50
    assert weight_bytes(100, {"dtype": "bfloat16"}, "float16") == 100
    assert weight_bytes(100, {}, "float32") == 100
    quantized = {"dtype": "bfloat16", "quantization_config": {}}
    assert weight_bytes(100, quantized, "float32") == 100


def test_all_ranks_together_take_half_of_what_is_left():
    free, weights = 20 * GIB, GIB
    assert room_for_states(free, weights) == 8 * GIB
    for ranks in (2, 4):
        left = free - weights - cpu.SERVER_BYTES - (ranks - 1) * cpu.RANK_BYTES
        assert ranks * room_for_states(free, weights, ranks) == left // 2
    assert room_for_states(GIB, weights) == 0
