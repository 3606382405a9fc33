"""Choices that rest on bounds of most scores are those of one who computes them all."""

import pytest
import torch

from lola_vllm.core.config import LolaConfig
from lola_vllm.core.ops import portable
from tests.support.backends import only
from tests.support.choices import (
    assert_a_prompt_chooses_as_single_steps,
    assert_bounds_choose_as_scores,
    per_token_problem,
)
from tests.support.problem import STATE_INDEX, make_problem, run, with_a_trend

# Long enough for most scores to be bounded; where sums are rounded to float32, choices between
# nearly equal scores part some day.
CASES = [  # T, dtype, head_dim, F, lam, sharing
    *(
        pytest.param(2500, *case, marks=only("cpp"))
        for case in (
            (torch.float32, 16, 16, 32, "none"),
            (torch.float64, 20, 16, 33, "none"),
            (torch.bfloat16, 20, 16, 70, "none"),
            (torch.float64, 16, 16, 33, "kv_head"),
        )
    ),
    *(
        pytest.param(500, *case, marks=only("cuda-emulated", "cuda", "triton"))
        for case in (
            (torch.float32, 16, 16, 32, "none"),
            (torch.bfloat16, 20, 9, 45, "none"),
            (torch.float16, 12, 40, 33, "kv_head"),
            (torch.float32, 132, 130, 37, "none"),
        )
    ),
    *(
        pytest.param(T, *case, marks=only("triton-interpreted"))
        for T, *case in (
            (130, torch.float32, 16, 16, 24, "none"),
            (100, torch.float32, 20, 9, 17, "kv_head"),
        )
    ),
]


@pytest.mark.parametrize("T, dtype, d, F, lam, sharing", CASES)
def test_the_same_choices_for_thousands_of_tokens(backend, T, dtype, d, F, lam, sharing):
    config = LolaConfig(
        window_size=8, sparse_cache_size=lam, update_interval=1,
        sparse_sharing=sharing,
    )  # fmt: skip
    problem = per_token_problem(backend, T, config, dtype, d, F=F)
    assert_bounds_choose_as_scores(backend, problem)


@only("cpp")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [32, 20])
def test_a_prompt_makes_the_choices_of_single_steps(backend, dtype, d):
    """C++ prefill bounds scores at every interval; its steps compute them all."""
    config = LolaConfig(window_size=16, sparse_cache_size=96)
    problem = with_a_trend(2000, config, dtype=dtype, d=d, F=16, group=1)
    assert_a_prompt_chooses_as_single_steps(backend, problem)


@only("cuda-emulated", "cuda")
def test_more_pairs_than_shared_memory_holds(backend):
    """Scores and lists of a cache that large lie in memory; after a prefill all are computed."""
    config = LolaConfig(window_size=5, sparse_cache_size=2800, update_interval=1)
    problem = make_problem(2809, config, Hkv=1, group=1, d=4, F=4, dtype=torch.float32)
    _, state = backend.run(problem, decode_from=2807)
    assert int(state.groups[0].layout.num_folded(torch.tensor(2809))) == 4
    _, direct = run(portable, problem)
    assert torch.equal(
        direct.groups[0].views.positions[STATE_INDEX], state.groups[0].views.positions[STATE_INDEX]
    )
    torch.testing.assert_close(
        direct.groups[0].views.H[STATE_INDEX],
        state.groups[0].views.H[STATE_INDEX],
        rtol=1e-4,
        atol=1e-4,
    )
