"""Tests of the C++ ops again, on what an older machine would run."""

import os
import subprocess
import sys

import pytest

from lola_vllm.ops import native

LOWER = native.ISA_NAMES[:-1]  # an ordinary run takes the best that the machine has


def run_again(isa: str, file: str, selection: str) -> None:
    """Run tests of a file in a process that is held to an instruction set.

    Args:
        selection: pytest's `-k`. Skips the caller's test where the machine lacks the set.
    """
    env = {**os.environ, "LOLA_VLLM_CPU_ISA": isa}
    check = "from lola_vllm.ops import native; native.load(); print(native.cpu_isa())"
    chosen = subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True)
    if chosen.stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    again = subprocess.run([*command, "-k", selection], env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout[-3000:]
    assert " passed" in again.stdout
