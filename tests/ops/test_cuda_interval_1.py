"""The CUDA update of interval 1, which bounds most scores, against one that computes them all."""

import pytest
import torch
from cuda_problem import portable_page, run
from problem import assert_bounds_hold, make_problem

from lola_vllm.config import LolaConfig


@pytest.mark.parametrize(
    "dtype, d, F, lam, sharing",
    [
        (torch.float32, 16, 16, 32, "none"),
        (torch.bfloat16, 20, 9, 45, "none"),
        (torch.float16, 12, 40, 33, "kv_head"),
        (torch.float32, 132, 130, 37, "none"),
    ],
)
def test_interval_1_makes_the_same_choices_for_hundreds_of_tokens(
    device, dtype, d, F, lam, sharing
):
    """Scores that are mostly bounded against scores computed anew at each token."""
    config = LolaConfig(
        window_size=8, sparse_cache_size=lam, update_interval=1, feature_dim=F,
        sparse_sharing=sharing,
    )  # fmt: skip
    group = 2 if sharing == "kv_head" else 1
    problem = make_problem(
        500, config, dtype=dtype, d=d, group=group, Hs=2 * group, scale=(16 / d) ** 0.5
    )
    problem.v *= torch.linspace(1, 3, 500).unsqueeze(-1).unsqueeze(-1).to(dtype)  # a trend
    _, layout, kept = run(problem, device)
    direct = portable_page(problem, layout)
    for name in ("positions", "sparse_k", "sparse_v", "exact_k", "exact_v"):
        assert torch.equal(getattr(direct, name)[2], getattr(kept, name)[2]), name
    torch.testing.assert_close(direct.H[2], kept.H[2], rtol=1e-4, atol=1e-4)
    assert_bounds_hold(problem, layout, kept, 2)


def test_more_pairs_than_shared_memory_holds(device):
    """Scores and lists of a cache that large lie in memory; after a prefill all are computed."""
    config = LolaConfig(window_size=5, sparse_cache_size=2800, update_interval=1, feature_dim=4)
    problem = make_problem(2809, config, Hkv=1, group=1, d=4, dtype=torch.float32)
    _, layout, views = run(problem, device, decode_from=2807)
    assert int(layout.num_folded(torch.tensor(2809))) == 4
    direct = portable_page(problem, layout)
    assert torch.equal(direct.positions[2], views.positions[2])
    torch.testing.assert_close(direct.H[2], views.H[2], rtol=1e-4, atol=1e-4)
