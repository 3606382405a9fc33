"""Other scores than the self-recall error: the pairs they keep, and that serving has none of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from problem import make_problem, poisoned_pool

from lola_vllm.config import LolaConfig
from lola_vllm.eval import EvalError, ablation
from lola_vllm.eval.ablation import score_by
from lola_vllm.ops import torch as portable

T, ETA, LAM, SINK = 96, 8, 12, 4
CONFIG = LolaConfig(window_size=ETA, sparse_cache_size=LAM, sink_size=SINK, feature_dim=8)
EVICTED = range(SINK, T - ETA)


def kept(score: str, cuts: tuple[int, ...] = (0, T)) -> list[list[int]]:
    """Sorted positions in the sparse cache of each head after T tokens, prefilled in pieces."""
    problem = make_problem(T, CONFIG, dtype=torch.float32)
    layout = problem.layout()
    _, views = poisoned_pool(layout, 3)
    slots = torch.tensor([1])
    with score_by(score) as selections:
        for start, stop in itertools.pairwise(cuts):
            q, k, v = (t[start:stop] for t in (problem.q, problem.k, problem.v))
            loc = torch.tensor([0, stop - start])
            context = torch.tensor([start])
            out = torch.empty_like(q)
            portable.prefill(q, k, v, problem.weights(), layout, views, slots, loc, context, out)
            assert out.isfinite().all()
    assert bool(selections) == (score != "sre")
    return [sorted(row) for row in views.positions[1].tolist()]


@pytest.fixture(autouse=True)
def torch_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOLA_VLLM_OPS", "torch")


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


def test_scores_differ_and_serving_keeps_its_own() -> None:
    scored, largest = portable.sre_scores, portable._largest
    before = kept("sre")
    found = [kept(score) for score in ("random", "newest", "norm")]
    assert kept("sre") == before
    assert portable.sre_scores is scored and portable._largest is largest
    assert all(a != b for i, a in enumerate([before, *found]) for b in [before, *found][:i])


def test_a_score_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvalError, match="must be sre, newest, random, norm"), score_by("best"):
        pass
    monkeypatch.setenv("LOLA_VLLM_OPS", "native")
    with pytest.raises(EvalError, match="set LOLA_VLLM_OPS=torch"), score_by("newest"):
        pass
