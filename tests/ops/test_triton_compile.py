"""Triton's kernels are built ahead of time, for machines without a GPU."""

import pytest

pytest.importorskip("triton")


# Bytes of registers that a thread puts aside, where that could not be avoided yet.
SPILLED = {
    ("fold, per token, weighted", 80): 40,
    ("prefill, int8", 90): 8,
    # Keys of int8 pairs are widened to float32.
    ("score, int8", 80): 104,
    ("score, int8", 90): 112,
    ("score, int8", 100): 96,
    ("score, per token, int8", 80): 104,
    ("score, per token, int8", 90): 128,
    ("score, per token, int8", 100): 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_without_spilling_and_fit(arch):
    """Llama-3.1-8B's shapes in bfloat16: machine code, within the architecture's limits."""
    from lola_vllm.kernels import aot

    for kernel in aot.kernels(aot.llama_8b()):
        usage = aot.compile_kernel(kernel, arch)
        assert usage.cubin.startswith(b"\x7fELF"), kernel.name
        assert usage.shared <= aot.SHARED_LIMIT[arch], kernel.name
        # 65536 registers per processor; local memory would make the kernels wait for DRAM.
        assert usage.registers * usage.num_warps * 32 <= 65536, kernel.name
        assert usage.stack <= SPILLED.get((kernel.name, arch), 0), kernel.name
