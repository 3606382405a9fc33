"""What the CPU multiplies fast."""

import pytest

from lola_vllm.core import cpu
from lola_vllm.core.cpu import bfloat16_flag, preferred_dtype

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
