"""Triton's kernels are built ahead of time, for machines without a GPU."""

import pytest

pytest.importorskip("triton")


# Bytes of registers that a thread puts aside, where that could not be avoided yet, on sm_80, sm_90
# and sm_100.
SPILLED = {
    # Between the phases of a chunk, what one of them needs waits for the others.
    "prefill": (16, 0, 0),
    "prefill, apart": (32, 40, 72),  # beside that, pointers to what is kept
    "prefill, int8": (40, 64, 128),
    "prefill, apart, int8": (8, 40, 72),
    "shift, int8": (0, 8, 0),
}
ARCHS = (80, 90, 100)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_and_fit(arch):
    """Llama-3.1-8B's shapes in bfloat16: machine code, within the architecture's limits.

    Of the oldest and the newest each has every other kernel; sm_90 has all.
    """
    from tools import compile_triton

    kernels = list(compile_triton.kernels(compile_triton.llama_8b()))
    for kernel in {80: kernels[::2], 90: kernels, 100: kernels[1::2]}[arch]:
        usage = compile_triton.compile_kernel(kernel, arch)
        assert usage.cubin.startswith(b"\x7fELF"), kernel.name
        assert usage.shared <= compile_triton.SHARED_LIMIT[arch], kernel.name
        # 65536 registers per processor; local memory would make the kernels wait for DRAM.
        assert usage.registers * usage.num_warps * 32 <= 65536, kernel.name
        spilled = SPILLED.get(kernel.name, (0, 0, 0))[ARCHS.index(arch)]
        assert usage.stack <= spilled, kernel.name
