"""Sparse pairs as int8: rounded as they leave the window, and so in all that follows."""

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import portable
from lola_vllm.core.ops.int8 import quantize
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from tests.support.backends import fewer
from tests.support.pages import (
    assert_unrecallable_stay,
)
from tests.support.problem import STATE_INDEX, make_problem, run, unrecallable

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def config_of(**fields):
    defaults = {"window_size": 10, "sparse_cache_size": 6, "sparse_dtype": "int8"}
    return LolaConfig(**defaults | fields)


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("lam", [0, 5, 100])
@pytest.mark.parametrize("T", [11, 23, 61])
@fewer("emulated", T=[61])
@fewer("interpreted", T=[23], lam=[5])
def test_equals_the_reference(backend, T, lam, interval):
    """No cache, one that overflows, and one that holds all."""
    config = config_of(sparse_cache_size=lam, update_interval=interval)
    problem = make_problem(T, config, dtype=backend.dtype, seed=T + lam, group=1)
    truth = problem.reference()
    for decode_from in (T, T // 2) if backend.pace == "interpreted" else (T, T // 2, 0):
        backend.check(problem, decode_from=decode_from, truth=truth)


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("Hs, sharing", [(2, "none"), (6, "none"), (6, "kv_head")])
@pytest.mark.parametrize("d", [16, 5, 32, 64])  # whole vectors on some machines, and on none
@fewer("interpreted", d=[5], Hs=[6], sharing=["kv_head"])
@fewer("emulated", d=[5, 64], Hs=[6])
def test_heads_head_sizes_sinks_and_importance(backend, d, Hs, sharing, interval):
    config = config_of(update_interval=interval, sparse_sharing=sharing, sink_size=3)
    T = 31 if backend.pace == "interpreted" else 57
    problem = make_problem(
        T, config, Hs=Hs, d=d, importance=True, dtype=backend.dtype, seed=d, scale=(8 / d) ** 0.5
    )
    decode_from = T - 4 if backend.prefills else 3
    backend.check(problem, [2, 5, 6, 25], decode_from=decode_from, extra_stride=192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interval, lam", [(1, 7), (8, 7), (8, 33)])
@fewer("interpreted", dtype=[torch.bfloat16], lam=[7], interval=[8])
def test_dtypes(backend, dtype, interval, lam):
    """A cache of an odd size, so that its last pair stands beside one of another dtype."""
    config = config_of(window_size=8, update_interval=interval, sparse_cache_size=lam)
    problem = make_problem(33 + lam, config, d=32, dtype=dtype, scale=0.5, seed=3)
    backend.check(problem, decode_from=27 + lam)


@pytest.mark.parametrize("parts", [2, 4])
@fewer("interpreted", parts=[2])
def test_pairs_that_are_cut_in_parts(backend, parts):
    """A set of several tiles."""
    config = config_of(sparse_cache_size=80, update_interval=16)
    problem = make_problem(114, config, dtype=backend.dtype, group=1, Hkv=1)
    backend.cut_in(parts).check(problem, decode_from=110)


@pytest.mark.parametrize("interval", [1, 4])
@fewer("interpreted", interval=[4])
def test_rows_of_zeros_large_numbers_and_small_ones(backend, interval):
    """Scales from 0 to beyond what other dtypes of 16 bits hold, and next to the least. The cache
    holds all pairs: squares of such numbers are none in float32."""
    config = config_of(update_interval=interval, sparse_cache_size=30)
    problem = make_problem(32, config, dtype=torch.float32, group=1)
    problem.k[3:6] = 0
    problem.v[4:9] = 0
    problem.v[9] *= 1e30
    problem.v[10] = 1e-44  # below the least that a scale can be
    problem.v[11] *= 1e-37
    _, state = backend.run(problem, decode_from=27)
    count = int(state.groups[0].layout.num_sparse(torch.tensor(32)))
    for kv in range(2):
        at = state.groups[0].views.positions[STATE_INDEX, kv, :count].long()
        assert sorted(at.tolist()) == list(range(count))
        for name in "kv":
            numbers, scale = (
                getattr(state.groups[0].views, f"sparse_{name}{end}")[STATE_INDEX, kv, :count]
                for end in ("", "_scale")
            )
            expected = quantize(getattr(problem, name)[at, kv])
            assert torch.equal(numbers, expected.numbers)
            assert torch.equal(scale, expected.scale)


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("sharing", ["none", "kv_head"])
@fewer("interpreted", interval=[5], sharing=["none"])
def test_scores_that_are_no_numbers_count_as_the_largest(backend, interval, sharing):
    """A row with a NaN or an infinity is all NaN, and nothing else is."""
    problem = unrecallable(interval, sharing, backend.dtype, sparse_dtype="int8", importance=True)
    out, state = backend.run(problem, decode_from=20 if backend.prefills else 0)
    assert_unrecallable_stay(problem, state)
    Hg = state.groups[0].layout.num_sparse_heads
    for scale in (
        state.groups[0].views.sparse_k_scale[STATE_INDEX],
        state.groups[0].views.sparse_v_scale[STATE_INDEX],
    ):
        assert scale[Hg // 2 :].isfinite().all()
    assert state.groups[0].views.sparse_v_scale[STATE_INDEX, 0].isnan().all()
    assert out[:, 3:].isfinite().all()  # of the other KV head


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("lam", [5, 100])
@fewer("interpreted", interval=[4], lam=[5])
def test_context_shifts_round_turned_keys_again(backend, lam, interval):
    config = config_of(sparse_cache_size=lam, update_interval=interval, window_size=6, sink_size=3)
    schedule = ShiftSchedule(length=32, interval=8)
    problem = make_problem(61, config, dtype=backend.dtype, schedule=schedule, seed=lam)
    if backend.dtype != torch.float64:
        # In float32 another number may be rounded to; what the page holds must be what is used.
        out, state = backend.run(problem, [15], decode_from=45)
        expected, other = run(portable, problem, [15], decode_from=45)
        torch.testing.assert_close(out, expected, **CLOSE)
        assert torch.equal(
            state.groups[0].views.sparse_k[STATE_INDEX], other.groups[0].views.sparse_k[STATE_INDEX]
        )
        return
    truth = problem.reference()
    for decode_from in (39, 40, 61):
        backend.check(problem, [15], decode_from=decode_from, truth=truth)
