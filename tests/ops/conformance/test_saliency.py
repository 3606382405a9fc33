"""Choices by weighed scores: a pair's saliency is stored with it and multiplies its error."""

from itertools import product

import pytest
import torch

from lola_vllm.config import LolaConfig
from lola_vllm.ops import portable
from tests.support.backends import fewer, only
from tests.support.pages import (
    assert_bounds_hold,
    assert_same_choices,
    assert_unrecallable_stay,
)
from tests.support.problem import make_problem, run, unrecallable

KNOWING = only("torch", "cuda-emulated", "cuda", "triton", "triton-interpreted")
LENGTHS = [1, 10, 11, 12, 23, 61]


@KNOWING
@fewer("emulated", T=[1, 11, 61, 150])
@fewer("interpreted", T=[23], lam=[5], interval=[4])
@pytest.mark.parametrize("interval", [1, 4, 64])
@pytest.mark.parametrize("lam", [0, 1, 5, 100])
@pytest.mark.parametrize("T", [*LENGTHS, 150])
def test_equals_the_reference(backend, T, lam, interval):
    """First evictions, a cache that is not full and one that is, and none."""
    config = LolaConfig(
        window_size=10, sparse_cache_size=lam, update_interval=interval, feature_dim=8,
        saliency=True,
    )  # fmt: skip
    problem = make_problem(T, config, dtype=backend.dtype, seed=T + lam)
    truth = problem.reference()
    for decode_from in (T, T // 2, 0):
        backend.check(problem, decode_from=decode_from, truth=truth)


@KNOWING
@fewer("interpreted", d=[5], Hs=[6], interval=[1])
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("Hs, sharing", list(product([2, 6], ["none", "kv_head"])))
@pytest.mark.parametrize("d", [16, 5, 24])  # an odd head: its last entry is in no rotary pair
def test_heads_and_head_sizes(backend, d, Hs, sharing, interval):
    config = LolaConfig(
        window_size=10, sparse_cache_size=6, update_interval=interval, feature_dim=8,
        sparse_sharing=sharing, sink_size=3, saliency=True,
    )  # fmt: skip
    problem = make_problem(57, config, Hs=Hs, d=d, dtype=backend.dtype, seed=d)
    decode_from = 30 if backend.prefills else 3
    backend.check(problem, [2, 5, 6, 25], decode_from=decode_from, extra_stride=192)


@KNOWING
@fewer("interpreted", dtype=[torch.bfloat16], interval=[8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interval", [1, 8])
def test_dtypes(backend, dtype, interval):
    """Keys and values are rounded to the dtype; the saliency is of float32."""
    config = LolaConfig(
        window_size=8, sparse_cache_size=6, update_interval=interval, feature_dim=8, saliency=True
    )
    problem = make_problem(60, config, d=32, dtype=dtype, scale=0.5, seed=3)
    backend.check(problem, decode_from=40)


@pytest.mark.parametrize(
    "T, dtype, d, F, lam, sharing",
    [
        *(
            pytest.param(500, *case, marks=only("cuda-emulated", "cuda", "triton"))
            for case in (
                (torch.float32, 16, 16, 32, "none"),
                (torch.bfloat16, 20, 9, 45, "none"),
                (torch.float16, 13, 40, 33, "kv_head"),
            )
        ),
        pytest.param(60, torch.float32, 5, 8, 17, "kv_head", marks=only("triton-interpreted")),
    ],
)
def test_weighed_bounds_leave_the_choices(backend, T, dtype, d, F, lam, sharing):
    """With interval 1 most scores are bounded. The saliency weighs the bounds, too."""
    config = LolaConfig(
        window_size=8, sparse_cache_size=lam, update_interval=1, feature_dim=F,
        sparse_sharing=sharing, saliency=True,
    )  # fmt: skip
    group, Hkv = 2 if sharing == "kv_head" else 1, 1 if backend.pace == "interpreted" else 2
    problem = make_problem(
        T, config, dtype=dtype, d=d, Hkv=Hkv, group=group, Hs=Hkv * group, scale=(16 / d) ** 0.5
    )
    # Values grow, so that old pairs lose their places again and again; their saliency does not.
    problem.v *= torch.linspace(1, 3, T)[:, None, None].to(dtype)
    problem.saliency[:, d // 2 : d // 2 + d] /= 3
    _, kept = backend.run(problem, [30, 31], decode_from=T // 5 if backend.prefills else 0)
    _, direct = run(portable, problem)
    assert_same_choices(kept, direct)
    assert_bounds_hold(problem, kept)


@KNOWING
@fewer("interpreted", sharing=["kv_head"], interval=[1])
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("sharing", ["none", "kv_head"])
def test_pairs_that_are_no_numbers_stay(backend, interval, sharing):
    """A NaN in a pair makes its saliency and its score NaN, which counts as infinite."""
    problem = unrecallable(interval, sharing, backend.dtype, saliency=True)
    _, state = backend.run(problem, decode_from=20)
    assert_unrecallable_stay(problem, state)
