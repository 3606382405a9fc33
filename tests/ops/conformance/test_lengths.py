"""Answers and pages around the window's length, whatever the cache and the interval."""

import functools

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import portable
from tests.support.backends import fewer
from tests.support.problem import STATE_INDEX, full_attention, make_problem, run

ETA = 10
LENGTHS = [1, ETA - 1, ETA, ETA + 1, 2 * ETA + 3, 61]


@functools.cache
def solved(T, lam, interval, group, dtype):
    """A problem, the reference's answers and state, and the sparse positions of portable's page."""
    config = LolaConfig(window_size=ETA, sparse_cache_size=lam, update_interval=interval)
    problem = make_problem(T, config, dtype=dtype, seed=T + lam, group=group)
    _, state = run(portable, problem)
    return problem, problem.reference(), state.groups[0].views.positions[STATE_INDEX]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fed", ["prompt", "both", "tokens"])
@pytest.mark.parametrize("interval", [1, 7, ETA])
@pytest.mark.parametrize("lam", [0, 1, 5, 100])
@pytest.mark.parametrize("T", LENGTHS)
@fewer("emulated", T=[1, ETA, ETA + 1, 61])
@fewer("interpreted", T=LENGTHS[:-1], fed=["prompt", "both"])
def test_equals_the_reference(backend, T, lam, interval, fed, dtype):
    group = 1 if backend.pace == "interpreted" else 3
    problem, truth, positions = solved(T, lam, interval, group, dtype)
    decode_from = {"prompt": T, "both": T // 2, "tokens": 0}[fed]
    _, state = backend.check(problem, decode_from=decode_from, truth=truth)
    filled = int(state.groups[0].layout.num_sparse(torch.tensor(T)))
    found = state.groups[0].views.positions[STATE_INDEX, :, :filled]
    assert torch.equal(found, positions[:, :filled]), (
        "state_indices in another order than portable's"
    )


@pytest.mark.parametrize("lam", [0, 100])
def test_a_window_or_cache_that_holds_everything_is_full_attention(backend, lam):
    config = LolaConfig(window_size=5 if lam else 50, sparse_cache_size=lam)
    problem = make_problem(40, config, dtype=backend.dtype, d=64)
    out, _ = backend.run(problem, [33], decode_from=37 if backend.prefills else 0)
    torch.testing.assert_close(out.double(), full_attention(problem), **backend.close)
