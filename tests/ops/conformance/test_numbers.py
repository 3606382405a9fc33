"""Large logits, features at their floor, ties, and values that are no numbers."""

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from tests.support.backends import fewer
from tests.support.pages import assert_state_matches, assert_unrecallable_stay
from tests.support.problem import STATE_INDEX, make_problem, unrecallable

ETA = 10
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
@pytest.mark.parametrize("parts", [1, 2, 4])
@fewer("interpreted", parts=[1, 2])
def test_extreme_logits_stay_finite(backend, mixing, parts):
    config = LolaConfig(window_size=ETA, sparse_cache_size=5, update_interval=3, mixing=mixing)
    problem = make_problem(40, config, dtype=torch.float32, scale=6.0)
    logits = torch.einsum("qhd,khd->hqk", problem.q[:, ::3], problem.k) / 4
    assert logits.abs().max() > 100
    out, _ = backend.cut_in(parts).run(problem, decode_from=20)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), problem.reference()[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fed", ["prompt", "tokens"])
def test_the_floor_of_features_is_kept_to_the_last_bits(backend, fed):
    config = LolaConfig(window_size=4, sparse_cache_size=3, update_interval=3)
    problem = make_problem(9, config, dtype=torch.float32, scale=40.0)
    _, state = backend.run(problem, decode_from=9 if fed == "prompt" else 0)
    expected = problem.reference()[1].s
    assert expected.min() < 3e-12
    torch.testing.assert_close(
        state.groups[0].views.s[STATE_INDEX].double(), expected, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("sharing", ["none", "kv_head"])
@pytest.mark.parametrize(
    "interval, T, longer, kept",
    [
        (12, 13, [], [0, 1, 2]),
        (12, 13, [5, 6], [0, 5, 6]),  # the larger norm wins whatever its age
        (1, 8, [], [0, 1, 2]),
        (1, 8, [3], [0, 1, 3]),
    ],
)
@pytest.mark.parametrize("fed", ["prompt", "tokens"])
def test_ties_keep_the_older_pair(backend, interval, T, longer, kept, sharing, fed):
    """Equal values, as equal tokens have them in layer 0, have exactly equal errors against an
    empty state. Where sets are shared, errors are relative and tie whatever the values."""
    config = LolaConfig(
        window_size=4, sparse_cache_size=3, update_interval=interval,
        sparse_sharing=sharing,
    )  # fmt: skip
    problem = make_problem(T, config, dtype=backend.dtype, Hs=6)
    problem.v[:] = problem.v[0]
    problem.v[longer] *= 2
    if sharing == "kv_head":
        kept = [0, 1, 2]
    _, state = backend.run(problem, [5], decode_from=T if fed == "prompt" else 0)
    positions = state.groups[0].views.positions[STATE_INDEX].sort(-1).values.tolist()
    assert positions == [kept] * state.groups[0].layout.num_sparse_heads
    assert_state_matches(problem, state, **CLOSE)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("fed", ["prompt", "tokens"])
@fewer("interpreted", fed=["prompt"])
def test_a_nan_costs_no_neighbour_its_entry(backend, sign, fed):
    """As many stay as there are state_indices."""
    config = LolaConfig(window_size=ETA, sparse_cache_size=4, update_interval=5)
    problem = make_problem(40, config, dtype=backend.dtype)
    problem.v[3, 0] = torch.tensor(torch.nan).copysign(torch.tensor(sign))
    _, state = backend.run(problem, decode_from=40 if fed == "prompt" else 0)
    positions = state.groups[0].views.positions[STATE_INDEX]
    assert (positions[0] == 3).any()
    assert positions.sort(-1).values.tolist() == problem.reference()[1].sparse_positions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("interval", [1, 5, 9])
@pytest.mark.parametrize("sharing", ["none", "kv_head"])
@pytest.mark.parametrize("fed", ["prompt", "both", "tokens"])
@fewer("interpreted", interval=[5], fed=["both"])
def test_scores_that_are_no_numbers_count_as_the_largest(backend, interval, sharing, dtype, fed):
    problem = unrecallable(interval, sharing, dtype)
    _, state = backend.run(problem, decode_from={"prompt": 40, "both": 20, "tokens": 0}[fed])
    assert_unrecallable_stay(problem, state)
