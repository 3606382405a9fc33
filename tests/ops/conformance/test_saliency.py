"""Choices by weighed scores: a pair's saliency is stored with it and multiplies its error."""

from itertools import product

import pytest
import torch

from lola_vllm.config import LolaConfig
from tests.support.backends import only
from tests.support.problem import make_problem

KNOWING = only("torch", "native", "native-threads")
LENGTHS = [1, 10, 11, 12, 23, 61]


@KNOWING
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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interval", [1, 8])
def test_dtypes(backend, dtype, interval):
    """Keys and values are rounded to the dtype; the saliency is of float32."""
    config = LolaConfig(
        window_size=8, sparse_cache_size=6, update_interval=interval, feature_dim=8, saliency=True
    )
    problem = make_problem(60, config, d=32, dtype=dtype, scale=0.5, seed=3)
    backend.check(problem, decode_from=40)
