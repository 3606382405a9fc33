"""Recent pairs: the newest of a sparse set stay, whatever their scores are."""

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from tests.support.backends import fewer
from tests.support.problem import STATE_INDEX, make_problem

ETA = 6


def config_of(**fields):
    defaults = {"window_size": ETA, "sparse_cache_size": 12, "recent_size": 5}
    return LolaConfig(**defaults | fields)


@pytest.mark.parametrize("interval", [1, 4, 9])
@pytest.mark.parametrize("recent", [1, 5, 11, 12])
@pytest.mark.parametrize("importance", [False, True])
@fewer("emulated", recent=[5, 12])
@fewer("interpreted", recent=[5], interval=[4], importance=[True])
def test_equals_the_reference(backend, recent, interval, importance):
    """With fewer recent pairs than a set holds, and with as many."""
    config = config_of(recent_size=recent, update_interval=interval)
    problem = make_problem(
        75, config, importance=importance, dtype=backend.dtype, seed=recent + interval
    )
    truth = problem.reference()
    for decode_from in (75, 40) if backend.prefills else (0,):
        _, state = backend.check(problem, decode_from=decode_from, truth=truth)
    found = state.groups[0].views.positions[STATE_INDEX].sort(-1).values
    end = int(state.groups[0].layout.window_start(torch.tensor(75)))
    newest = torch.arange(end - recent, end, dtype=found.dtype, device=found.device)
    assert (found[:, -recent:] == newest).all()


@pytest.mark.parametrize("sharing", ["none", "kv_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@fewer("interpreted", sharing=["kv_head"], dtype=[torch.bfloat16])
def test_heads_and_pairs_of_8_bits(backend, sharing, dtype):
    config = config_of(sparse_sharing=sharing, sparse_dtype="int8", update_interval=4, sink_size=3)
    problem = make_problem(57, config, Hs=6, d=24, importance=True, dtype=dtype, scale=0.5, seed=4)
    decode_from = 40 if backend.prefills else 3
    backend.check(problem, [2, 5, 6, 25], decode_from=decode_from, extra_stride=192)
