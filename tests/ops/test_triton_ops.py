"""The Triton back end against the reference, in Triton's interpreter, and its ahead-of-time build.

The interpreter is chosen by an environment variable when Triton is imported, so the checks run in
processes of their own (`triton_driver.py`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

DRIVER = Path(__file__).parent / "triton_driver.py"
CHECKS = {
    "lengths": 60,
    "each_token": 2,
    "heads": 8,
    "splits": 11,
    "sizes": 5,
    "batch": 3,
    "live": 4,
    "hard": 8,
    "long": 4,
    "arguments": 3,
    "warm": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("group", CHECKS)
def test_interpreted_kernels_equal_the_reference(group):
    result = subprocess.run(
        [sys.executable, str(DRIVER), group],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    # A driver that skipped its work must not pass.
    assert result.stdout.splitlines()[-1] == f"{CHECKS[group]} checks"


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
        assert usage.stack == 0, kernel.name
