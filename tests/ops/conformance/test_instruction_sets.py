"""The suite for the C++ ops, on what an older machine would run.

The instruction set is chosen when the first kernel runs, so in processes of their own.
"""

import os
import subprocess
import sys

import pytest

from lola_vllm.ops import native
from tests.support.backends import run_suite


@pytest.mark.slow
@pytest.mark.parametrize("isa", native.ISA_NAMES[:-1])  # the outer run takes the machine's best
def test_a_lower_instruction_set(isa):
    env = {"LOLA_VLLM_CPU_ISA": isa}
    check = "from lola_vllm.ops import native; native.load(); print(native.cpu_isa())"
    command = [sys.executable, "-c", check]
    chosen = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    if chosen.stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}")
    # A prime, so that no value of a parameter is left out in all tests.
    assert run_suite("native", every=3, **env) > 250
