"""A model without a part: what its answers are made of, and which parts there are."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import cpp, portable
from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.ablation import leave_out
from tests.support.problem import STATE_INDEX, Problem, make_problem, prefill

T, ETA, LAM, SINK = 96, 8, 12, 4
CONFIG = LolaConfig(window_size=ETA, sparse_cache_size=LAM, sink_size=SINK)


def without(problem: Problem, parts: str) -> Problem:
    """A problem with the weights of a layer that leaves out some parts."""
    layer = nn.Module()
    layer.lola = SimpleNamespace(mixing=problem.config.mixing)
    layer.window_factors = nn.Parameter(problem.window_factors.clone())
    layer.importance = None
    if problem.importance is not None:
        layer.importance = nn.Parameter(problem.importance.clone())
    leave_out(nn.Sequential(nn.Linear(2, 2), layer), parts)
    weights = None if layer.importance is None else layer.importance.detach()
    return dataclasses.replace(
        problem, window_factors=layer.window_factors.detach(), importance=weights
    )


@pytest.mark.parametrize("ops", [portable, cpp], ids=["torch", "cpp"])
def test_without_the_hidden_state_answers_are_of_the_exact_pairs(ops):
    """The last query sees sinks, sparse cache, window and itself, by softmax attention."""
    if ops is cpp and not cpp.load():
        pytest.skip("the C++ ops are not built")
    problem = make_problem(T + 1, CONFIG, dtype=torch.float32)
    bare = without(problem, "hidden-state")
    outs, caches = [], []
    for each in (problem, bare):
        state = each.state()
        outs.append(prefill(ops, each, state, 0, T + 1)[-1])  # type: ignore[arg-type]
        caches.append(state.groups[0].views.positions[STATE_INDEX].sort(-1).values)
    assert caches[0].equal(caches[1])  # the choice is the same
    group = problem.q.shape[1] // problem.k.shape[1]
    for head in range(problem.q.shape[1]):
        cached = caches[1][head // group].tolist()
        seen = torch.tensor([*range(SINK), *cached, *range(T - ETA, T + 1)])
        k, v = (x[seen, head // group] for x in (problem.k, problem.v))
        shares = (k @ problem.q[-1, head] * problem.q.shape[-1] ** -0.5).softmax(-1)
        torch.testing.assert_close(outs[1][head], shares @ v, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outs[0], outs[1], atol=1e-2)


def test_without_importance_the_error_alone_chooses():
    weighted = make_problem(T, CONFIG, dtype=torch.float32, importance=True)
    alone = dataclasses.replace(weighted, importance=None)
    found = []
    for problem in (weighted, alone, without(weighted, "importance")):
        state = problem.state()
        prefill(portable, problem, state, 0, T)
        found.append(state.groups[0].views.positions[STATE_INDEX].sort(-1).values.tolist())
    assert found[1] == found[2] != found[0]
    both = without(weighted, "importance, hidden-state")
    assert (both.window_factors > 50).all() and not both.importance.any()  # type: ignore[union-attr]


def test_parts_that_cannot_be_left_out():
    with pytest.raises(EvalError, match="'window' is no part; leave out hidden-state, importance"):
        leave_out(nn.Module(), "hidden-state,window")
    lolcats = make_problem(T, CONFIG.model_copy(update={"mixing": "lolcats"}), dtype=torch.float32)
    with pytest.raises(EvalError, match="mixing = 'lolcats' counts the hidden state"):
        without(lolcats, "hidden-state")
