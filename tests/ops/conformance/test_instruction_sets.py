"""The suite for the C++ ops, on what an older machine would run.

The instruction set is chosen when the first kernel runs, so in processes of their own.
"""

import os
import subprocess
import sys

import pytest

from lola_vllm.core.ops import cpp
from tests.support.backends import run_suite


@pytest.mark.slow
@pytest.mark.parametrize("isa", cpp.ISA_NAMES[:-1])
def test_a_lower_instruction_set(isa):
    assert cpp.load()
    if isa == cpp.cpu_isa():
        pytest.skip(f"the outer run has {isa}")
    env = {"LOLA_VLLM_CPU_ISA": isa}
    check = "from lola_vllm.core.ops import cpp; cpp.load(); print(cpp.cpu_isa())"
    command = [sys.executable, "-c", check]
    chosen = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    if chosen.stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}")
    # A prime, so that no value of a parameter is left out in all tests.
    assert run_suite("cpp", every=11, **env) > 60
