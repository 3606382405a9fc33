"""Choices by weighted scores: a pair's importance is stored with it and multiplies its error."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from tests.support.backends import fewer
from tests.support.problem import STATE_INDEX, make_problem

ETA = 10

weighted_problem = partial(make_problem, importance=True)


def config_of(**fields):
    defaults = {"window_size": ETA, "sparse_cache_size": 6}
    return LolaConfig(**defaults | fields)


@pytest.mark.parametrize("interval", [1, 4, 64])
@pytest.mark.parametrize("lam", [0, 1, 5, 100])
@pytest.mark.parametrize("T", [1, ETA, ETA + 1, ETA + 2, 23, 61, 150])
@fewer("emulated", T=[ETA + 1, 61])
@fewer("interpreted", T=[23], lam=[5], interval=[1, 4])
def test_equals_the_reference(backend, T, lam, interval):
    """First evictions, a cache that is not full and one that is, and none."""
    config = config_of(sparse_cache_size=lam, update_interval=interval)
    problem = weighted_problem(T, config, dtype=backend.dtype, seed=T + lam, group=1)
    truth = problem.reference()
    for decode_from in (T, T // 2) if backend.pace == "interpreted" else (T, T // 2, 0):
        backend.check(problem, decode_from=decode_from, truth=truth)


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("Hs, sharing", list(product([2, 6], ["none", "kv_head"])))
@pytest.mark.parametrize("d", [16, 5, 24])  # an odd head: its last entry is in no rotary pair
@fewer("interpreted", d=[5], Hs=[6], sharing=["kv_head"])
def test_heads_and_head_sizes(backend, d, Hs, sharing, interval):
    config = config_of(update_interval=interval, sparse_sharing=sharing, sink_size=3)
    problem = weighted_problem(57, config, Hs=Hs, d=d, dtype=backend.dtype, seed=d)
    decode_from = 50 if backend.prefills else 3
    backend.check(problem, [2, 5, 6, 25], decode_from=decode_from, extra_stride=192)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interval", [1, 8])
@fewer("interpreted", dtype=[torch.bfloat16], interval=[8])
def test_dtypes(backend, dtype, interval):
    """Keys and values are rounded to the dtype; the importance is of float32."""
    config = config_of(window_size=8, update_interval=interval)
    problem = weighted_problem(50, config, d=32, dtype=dtype, scale=0.5, seed=3)
    _, state = backend.check(problem, decode_from=40)
    assert state.groups[0].views.score_weights.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("bias", [1e4, -1e4, 0.0])
@fewer("interpreted", bias=[1e4])
def test_equal_importances_change_no_choice(backend, bias):
    """Also beyond the largest, where all are clamped to e^20 or e^-20."""
    problem = weighted_problem(60, config_of(update_interval=4), dtype=backend.dtype)
    problem.importance[:] = 0
    problem.importance[:, -1] = bias
    _, state = backend.check(problem, decode_from=50 if backend.prefills else 0)
    found = state.groups[0].views.score_weights[STATE_INDEX].double()
    expected = torch.tensor(max(-20.0, min(20.0, bias))).double().exp()
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-5, atol=0)
    plain = replace(problem, importance=None)
    assert state.groups[0].views.positions[STATE_INDEX].sort(-1).values.tolist() == (
        plain.reference()[1].sparse_positions
    )
