"""Other scores than the self-recall error: the pairs they keep, and that serving has none of it."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lola_vllm.core.config import LolaConfig
from lola_vllm.core.ops import Backend, cpp, portable
from lola_vllm.engine.vllm.attention import LolaAttention
from lola_vllm.evaluation import EvalError, ablation
from lola_vllm.evaluation.ablation import SCORES, CountedScore, leave_out, use_score
from tests.support.problem import STATE_INDEX, Problem, decode, make_problem, prefill

T, ETA, LAM, SINK = 96, 8, 12, 4
CONFIG = LolaConfig(window_size=ETA, sparse_cache_size=LAM, sink_size=SINK)
EVICTED = range(SINK, T - ETA)


def kept(score: str, cuts: tuple[int, ...] = (0, T)) -> list[list[int]]:
    """Sorted positions in the sparse cache of each head after T tokens, prefilled in pieces."""
    problem = make_problem(T, CONFIG, dtype=torch.float32)
    state = problem.state()
    other = None if score == "sre" else CountedScore(SCORES[score])
    ops = Backend(
        "torch", partial(portable.decode, score=other), partial(portable.prefill, score=other)
    )
    for start, stop in itertools.pairwise(cuts):
        if stop - start == 1:
            out = decode(ops, problem, state, start)
        else:
            out = prefill(ops, problem, state, start, stop)
        assert out.isfinite().all()
    assert other is None or other.selections > 0
    return [sorted(row) for row in state.groups[0].views.positions[STATE_INDEX].tolist()]


def test_newest_keeps_the_last_to_leave_the_window() -> None:
    assert kept("newest") == [list(EVICTED)[-LAM:]] * 2


def test_norm_keeps_the_longest_values() -> None:
    values = make_problem(T, CONFIG, dtype=torch.float32).v.norm(dim=-1)
    for head, positions in enumerate(kept("norm")):
        order = sorted(EVICTED, key=lambda t: -float(values[t, head]))
        assert positions == sorted(order[:LAM])


def test_random_keeps_a_uniform_sample_of_all_that_was_evicted() -> None:
    positions = torch.arange(T)[None, None].expand(1, 2, T)
    scores = ablation.random(torch.empty(1, 2, T, 4), positions)[0]
    for head, found in enumerate(kept("random")):
        order = sorted(EVICTED, key=lambda t: -float(scores[head, t]))
        assert found == sorted(order[:LAM])
    many = torch.arange(20_000)[None, None].expand(1, 4, 20_000)
    scores = ablation.random(torch.empty(1, 4, 20_000, 1), many)[0]
    assert float(scores.min()) >= 0 and float(scores.max()) < 1
    for row in scores:  # uniform, and neighbours have nothing to do with each other
        assert torch.histc(row, 10, 0, 1) == pytest.approx(torch.full((10,), 2000.0), abs=200)
        assert abs(float(torch.corrcoef(torch.stack([row[1:], row[:-1]]))[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(scores).triu(1).abs().max())) < 0.03


@pytest.mark.parametrize("score", ["sre", "random", "newest", "norm"])
def test_the_choice_does_not_depend_on_how_a_prompt_is_split(score: str) -> None:
    assert kept(score) == kept(score, (0, 1, 30, 31, 77, T))


def test_every_score_keeps_other_pairs() -> None:
    found = [kept(score) for score in ("sre", *SCORES)]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def layer(ops: Backend) -> LolaAttention:
    """A LoLA layer with nothing but its ops."""
    made = LolaAttention.__new__(LolaAttention)
    nn.Module.__init__(made)
    made.ops = ops
    return made


def test_the_layers_of_a_model_are_given_the_score_and_no_other_layer_is() -> None:
    ops = Backend("torch", portable.decode, portable.prefill)
    model, serving = nn.Sequential(nn.Linear(2, 2), layer(ops)), layer(ops)
    score = CountedScore(ablation.newest)
    use_score(model, score)
    problem, given = make_problem(T, CONFIG, dtype=torch.float32), model[1].ops
    state = problem.state()
    prefill(given, problem, state, 0, T - 1)
    prefilled = score.selections
    decode(given, problem, state, T - 1)  # an update follows the last token
    assert 0 < prefilled < score.selections
    assert serving.ops == ops


def test_another_back_end_than_torch_is_refused() -> None:
    model = nn.Sequential(layer(Backend("cpp (avx2)", portable.decode, portable.prefill)))
    with pytest.raises(EvalError, match=r"cpp \(avx2\) knows no other .* LOLA_VLLM_OPS=torch"):
        use_score(model, ablation.newest)


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
def test_without_the_hidden_state_answers_are_of_the_exact_pairs(ops: object) -> None:
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


def test_without_importance_the_error_alone_chooses() -> None:
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


def test_parts_that_cannot_be_left_out() -> None:
    with pytest.raises(EvalError, match="'window' is no part; leave out hidden-state, importance"):
        leave_out(nn.Module(), "hidden-state,window")
    lolcats = make_problem(T, CONFIG.model_copy(update={"mixing": "lolcats"}), dtype=torch.float32)
    with pytest.raises(EvalError, match="mixing = 'lolcats' counts the hidden state"):
        without(lolcats, "hidden-state")
