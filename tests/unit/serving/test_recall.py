"""What is read from a page: its sparse cache with errors."""

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import portable
from lola_vllm.core.ops.int8 import rounded
from lola_vllm.core.ops.reference import feature_map, pair_importance, self_recall_error
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.serving import recall
from lola_vllm.serving.keys import PromptPairs
from lola_vllm.serving.recall import recalled, remembered
from tests.support.problem import STATE_INDEX, make_problem, prefill

CONFIGS = {
    "interval-is-window": {},
    "paper": {"update_interval": 1},
    "short-interval": {"update_interval": 3, "sink_size": 2},
    "no-cache": {"sparse_cache_size": 0},
    "importance": {"update_interval": 3},
    "int8": {"sparse_dtype": "int8", "update_interval": 3},
    "shifted": {"update_interval": 4},  # with keys that are rotated before they are folded
}


def problem_of(n, kind, Hs):
    config = LolaConfig(**{"window_size": 8, "sparse_cache_size": 12, **CONFIGS[kind]})
    schedule = ShiftSchedule(32, 8, fold_rotation=2) if kind == "shifted" else None
    importance = kind in ("importance", "int8")
    return make_problem(n, config, F=6, Hs=Hs, importance=importance, schedule=schedule)


def errors_of(problem, state, head, k, v):
    phi = feature_map(k, problem.feature_map_k[head])
    return self_recall_error(phi, v, state.H[head], state.s[head])


def page_after(problem, n):
    """The page `[page_bytes]` after the first n tokens, NaN where nothing was written, and the
    heads that it is of."""
    layer = problem.state()
    prefill(portable, problem, layer, 0, n)
    return layer.pages[STATE_INDEX], layer.groups[0]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("n", [1, 9, 21, 47, 77])
@pytest.mark.parametrize("Hs", [2, 6])
def test_remembered_is_the_references_cache_with_its_errors(kind, n, Hs):
    problem = problem_of(n, kind, Hs)
    page, group = page_after(problem, n)
    positions, errors, score_weights = remembered(group, page, n)
    _, state = problem.reference()
    assert positions.tolist() == state.sparse_positions
    assert (score_weights is None) == (problem.importance is None and problem.rotation is None)
    for head, held in enumerate(state.sparse_positions):
        kv = head // (Hs // 2)
        k, v = state.k[head, held], state.v[head, held]
        folded = problem.rotation.rotate_for_fold(k) if kind == "shifted" else k
        expected = errors_of(problem, state, head, folded, v)
        torch.testing.assert_close(errors[head], expected, rtol=1e-6, atol=1e-9)
        if problem.importance is not None:
            w = pair_importance(k, v, problem.importance[kv])
            torch.testing.assert_close(score_weights[head], w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "shifted"])
@pytest.mark.parametrize("Hs", [2, 6])
def test_recalled_is_the_references_error_of_every_token_that_left_the_window(
    kind, Hs, monkeypatch
):
    monkeypatch.setattr(recall, "MAX_SCORED", 7)
    n = 77
    problem = problem_of(n, kind, Hs)
    page, group = page_after(problem, n)
    layout = group.layout
    errors = recalled(group, page, n, PromptPairs(problem.k, problem.v))
    _, state = problem.reference()
    left = list(range(layout.sink_size, int(layout.window_start(torch.tensor(n)))))
    assert errors.shape == (Hs, len(left)) and len(left) > 50
    for head in range(Hs):
        k, v = problem.k[left, head // (Hs // 2)], problem.v[left, head // (Hs // 2)]
        if layout.int8_pairs:
            k, v = rounded(k), rounded(v)
        expected = errors_of(problem, state, head, k, v)
        torch.testing.assert_close(errors[head], expected, rtol=1e-6, atol=1e-9)
