"""The simulation of sums over hundreds of millions of tokens, over some thousands.

The simulation imports numba. vLLM 0.32 cannot start an engine for CPUs in a process that has
numba: it looks through every module for kernels and fails at one of llvmlite's objects. So the
cases have a process of their own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("endless_sums_cases.py")


@pytest.mark.slow
def test_the_cases_pass() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
