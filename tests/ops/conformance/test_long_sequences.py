"""Hidden states of long sequences: what is folded in arrives, and errors stay small."""

import pytest

from lola_vllm.core.ops import portable
from tests.support.backends import BACKENDS, only
from tests.support.long_run import gain, long_problem

LONG, LONGEST = 200_000, 10_000_000
# xformers has no part in updates, and threads share out rows and heads, not sums.
UPDATING = [n for n in BACKENDS if n not in ("cpp-threads", "xformers-interpreted")]


def arrived_in(backend, interval, folded, tokens):
    """Two heads and so many tokens, or as many as take some seconds."""
    if backend.pace == "full":
        problem, prompt = long_problem(interval, tokens), 0.5 if backend.prefills else 0.0
        first = backend if backend.prefills else portable
        return gain(backend, problem.to(backend.device), folded, prompt, first)
    if backend.pace == "emulated":
        return gain(backend, long_problem(interval, 512, Hkv=1), folded, prompt=0.0)
    tokens = {1: 100, 64: 320}[interval]
    return gain(backend, long_problem(interval, tokens, Hkv=1), folded, prompt=1.0)


@only(*UPDATING)
@pytest.mark.parametrize("interval", [1, 64])
def test_errors_stay_small(backend, interval):
    """Rounded to nearest, at interval 1, five in a hundred of what is folded would be lost."""
    arrived = arrived_in(backend, interval, LONGEST, 2000)
    part = 5e-3 if backend.pace == "full" else 1e-2  # of fewer tokens, each weighs more
    assert arrived.s.abs().max() < part
    assert arrived.H.abs().max() < part
    assert arrived.error_at(LONGEST) < 1e-4
