"""What is read from a page: its sparse cache with errors."""

import pytest
import torch

from lola_vllm.core.config import LolaConfig
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
}
WEIGHTED = ("importance", "int8")


def problem_of(T, fields, **options):
    config = LolaConfig(**{"window_size": 8, "sparse_cache_size": 12, **fields})
    return make_problem(T, config, F=6, **options)


def page_after(problem, n):
    """The page `[page_bytes]` after the first n tokens, NaN where nothing was written, and the
    heads that it is of."""
    layer = problem.state()
    prefill(portable, problem, layer, 0, n)
    return layer.pages[STATE_INDEX], layer.groups[0]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("n", [1, 9, 21, 77])
@pytest.mark.parametrize("Hs", [2, 6])
def test_remembered_is_the_references_cache_with_its_errors(kind, n, Hs):
    problem = problem_of(n, CONFIGS[kind], Hs=Hs, importance=kind in WEIGHTED)
    page, group = page_after(problem, n)
    positions, errors, score_weights = remembered(group, page, n)
    _, state = problem.reference()
    assert positions.tolist() == state.sparse_positions
    assert (score_weights is None) == (problem.importance is None)
    for head, held in enumerate(state.sparse_positions):
        kv = head // (Hs // 2)
        k, v = state.k[head, held], state.v[head, held]
        phi = feature_map(k, problem.feature_map_k[head])
        expected = self_recall_error(phi, v, state.H[head], state.s[head])
        torch.testing.assert_close(errors[head], expected, rtol=1e-6, atol=1e-9)
        if score_weights is not None:
            w = pair_importance(k, v, problem.importance[kv])
            torch.testing.assert_close(score_weights[head], w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [33, 47, 90])
def test_errors_of_a_page_that_was_shifted_are_those_that_its_updates_compare(n):
    """The hidden state then has keys that were rotated before they were folded."""
    schedule = ShiftSchedule(32, 8, fold_rotation=2)
    problem = problem_of(n, {"update_interval": 4}, schedule=schedule)
    page, group = page_after(problem, n)
    positions, errors, _ = remembered(group, page, n)
    _, state = problem.reference()
    assert positions.tolist() == state.sparse_positions
    for head, held in enumerate(state.sparse_positions):
        k, v = problem.rotation.rotate_for_fold(state.k[head, held]), state.v[head, held]
        phi = feature_map(k, problem.feature_map_k[head])
        expected = self_recall_error(phi, v, state.H[head], state.s[head])
        torch.testing.assert_close(errors[head], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("Hs", [2, 6])
def test_recalled_is_the_references_error_of_every_token_that_left_the_window(
    kind, Hs, monkeypatch
):
    monkeypatch.setattr(recall, "MAX_SCORED", 7)
    n = 77
    problem = problem_of(n, CONFIGS[kind], Hs=Hs, importance=kind in WEIGHTED)
    page, group = page_after(problem, n)
    layout = group.layout
    errors = recalled(group, page, n, PromptPairs(problem.k, problem.v))
    _, state = problem.reference()
    left = list(range(layout.sink_size, int(layout.window_start(torch.tensor(n)))))
    assert errors.shape == (Hs, len(left)) and len(left) > 50
    for head in range(Hs):
        kv = head // (Hs // 2)
        k, v = problem.k[left, kv], problem.v[left, kv]
        if layout.int8_pairs:
            k, v = rounded(k), rounded(v)
        phi = feature_map(k, problem.feature_map_k[head])
        expected = self_recall_error(phi, v, state.H[head], state.s[head])
        torch.testing.assert_close(errors[head], expected, rtol=1e-6, atol=1e-9)
