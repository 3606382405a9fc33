"""Hidden states of long sequences: what is folded in arrives, and errors stay small.

The Triton back end's part is the group "long" of triton_driver.py.
"""

import os

import pytest
import torch
from cuda_problem import decode as cuda_decode
from instruction_sets import LOWER, run_again
from long_run import SLOT, gain, long_problem
from problem import assert_bounds_hold

from lola_vllm.ops import native, portable
from lola_vllm.state import StateViews

LONG, LONGEST = 200_000, 10_000_000


def feed_by(ops):
    """Half of the tokens as a prompt, half one by one."""

    def feed(problem, layout, views, start, stop, skipped):
        middle = (start + stop) // 2
        slots = torch.tensor([SLOT])
        ops.prefill(
            *(x[start:middle] for x in (problem.q, problem.k, problem.v)), problem.weights(),
            layout, views, slots, torch.tensor([0, middle - start]),
            torch.tensor([start + skipped]), torch.empty_like(problem.q[start:middle]),
        )  # fmt: skip
        for t in range(middle, stop):
            ops.decode(
                *(x[t : t + 1] for x in (problem.q, problem.k, problem.v)), problem.weights(),
                layout, views, slots, torch.tensor([t + skipped + 1]),
                torch.empty_like(problem.q[t : t + 1]),
            )  # fmt: skip

    return feed


@pytest.fixture(params=["torch", "native"])
def feed(request):
    if request.param == "native":
        assert native.load()
    return feed_by(portable if request.param == "torch" else native)


@pytest.mark.parametrize("interval", [1, 64])
def test_what_is_folded_arrives(feed, interval):
    arrived = gain(feed, long_problem(interval, 1000), LONG)
    assert arrived.s.abs().max() < 1e-3
    assert arrived.H.abs().max() < 1e-3


@pytest.mark.parametrize("interval", [1, 64])
def test_errors_stay_small(feed, interval):
    """Rounded to nearest, at interval 1, five in a hundred of what is folded would be lost."""
    arrived = gain(feed, long_problem(interval, 2000), LONGEST)
    assert arrived.s.abs().max() < 5e-3
    assert arrived.H.abs().max() < 5e-3
    assert arrived.error_at(LONGEST) < 1e-4


@pytest.mark.parametrize("interval", [1, 64])
def test_errors_grow_like_the_root_of_the_number_of_folds(interval):
    """Far below the bias of rounding to nearest, which grows like the number."""
    assert native.load()
    arrived = gain(feed_by(native), long_problem(interval, 40_000, Hkv=1), LONGEST)
    assert arrived.s.abs().max() < 1e-3
    assert arrived.error_at(LONGEST) < 1e-4


def test_bounds_of_native_hold():
    """They know what is folded, and must leave room for how it is rounded."""
    assert native.load()
    problem = long_problem(1, 10_000, Hkv=1, lam=40)
    arrived = gain(feed_by(native), problem, LONGEST)
    assert_bounds_hold(problem, arrived.layout, arrived.views, SLOT)


@pytest.mark.parametrize("interval", [1, 64])
def test_cuda_kernels(device, interval):
    def feed(problem, layout, views, start, stop, skipped):
        if start == 0:
            return feed_by(portable)(problem, layout, views, start, stop, skipped)
        moved = StateViews(*(part.to(device) for part in views))
        for t in range(start, stop):
            cuda_decode(
                *(x[t : t + 1].to(device) for x in (problem.q, problem.k, problem.v)),
                problem.weights(), layout, moved, torch.tensor([SLOT], device=device),
                torch.tensor([t + skipped + 1], device=device),
                torch.empty_like(problem.q[t : t + 1], device=device),
            )  # fmt: skip
        for mine, its in zip(views, moved, strict=True):
            mine.copy_(its)

    arrived = gain(feed, long_problem(interval, 512, Hkv=1), LONG)
    assert arrived.s.abs().max() < 1e-3 and arrived.H.abs().max() < 1e-3
    arrived = gain(feed, long_problem(interval, 512, Hkv=1), LONGEST)
    assert arrived.s.abs().max() < 1e-2 and arrived.H.abs().max() < 1e-2
    assert arrived.error_at(LONGEST) < 1e-4


@pytest.mark.parametrize("isa", LOWER)
@pytest.mark.skipif("LOLA_VLLM_CPU_ISA" in os.environ, reason="is the inner run")
def test_every_instruction_set(isa):
    run_again(isa, __file__, "native or root")
