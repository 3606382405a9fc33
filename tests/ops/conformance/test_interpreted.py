"""The suite for Triton's kernels, in its interpreter.

That is chosen by an environment variable before Triton is imported, so in processes of their own.
"""

import pytest

from tests.support.backends import INTERPRETED, run_suite

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name):
    if name.startswith("xformers"):
        pytest.importorskip("xformers")
    passed = run_suite(name, every=3, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert passed > 20
