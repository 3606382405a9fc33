"""Identities that LoLA must satisfy (docs/algorithm.md section 5), on the reference itself."""

from dataclasses import replace

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops.reference import (
    feature_map,
    lola_attention,
    pair_importance,
)
from tests.support.problem import full_attention, make_problem

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def config(**kwargs):
    return LolaConfig(**{"window_size": 8, "sparse_cache_size": 5, **kwargs})


@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
@pytest.mark.parametrize("sizes", [{"window_size": 40}, {"sparse_cache_size": 40}])
def test_large_window_or_cache_is_full_attention(sizes, mixing):
    problem = make_problem(40, config(mixing=mixing, update_interval=3, **sizes))
    torch.testing.assert_close(problem.reference()[0], full_attention(problem), **EXACT)


@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
def test_without_a_cache_window_and_linear_attention_share_a_denominator(mixing):
    """LoLCATs: arXiv 2410.10254 eq. 6. LoLA: raw exponentials, and 1 - g for the linear part."""
    problem = make_problem(37, config(sparse_cache_size=0, mixing=mixing, update_interval=8))
    out, _ = problem.reference()
    q, k, v = problem.q, problem.k, problem.v
    for t in (7, 8, 16, 24, 36):
        start = max(0, t // 8 * 8 - 8)
        for h in range(6):
            z = k[start : t + 1, h // 3] @ q[t, h] / 4
            g = problem.window_factors[h].double().sigmoid()
            largest, rest = (z.max(), 1) if mixing == "lolcats" else (0, 1 - g)
            w = g * (z - largest).exp()
            phi_q = feature_map(q[t, h], problem.feature_map_q[h])
            lin = rest * feature_map(k[:start, h // 3], problem.feature_map_k[h // 3]) @ phi_q
            y = (w @ v[start : t + 1, h // 3] + lin @ v[:start, h // 3]) / (w.sum() + lin.sum())
            torch.testing.assert_close(out[t, h], y, **EXACT)


@pytest.mark.parametrize("interval", [1, 3, 8, 11])
@pytest.mark.parametrize("Hs", [2, 6])
@pytest.mark.parametrize("sharing", ["none", "kv_head"])
def test_every_position_is_in_exactly_one_memory(interval, Hs, sharing):
    cfg = config(update_interval=interval, sink_size=3, sparse_sharing=sharing)
    problem = make_problem(50, cfg, Hs=Hs)
    _, state = problem.reference()
    phi = feature_map(
        problem.k.repeat_interleave(Hs // 2, 1).transpose(0, 1), problem.feature_map_k
    )
    for h in range(Hs):
        exact = [*state.window_positions, *state.sparse_positions[h]]
        assert len(set(exact)) == len(exact) == len(state.window_positions) + 5
        folded = sorted(set(range(50)) - set(exact))
        torch.testing.assert_close(state.s[h], phi[h, folded].sum(0), **EXACT)
        v = problem.v[folded, h // (Hs // 2)]
        torch.testing.assert_close(state.H[h], phi[h, folded].T @ v, **EXACT)
        torch.testing.assert_close(
            state.s[h].sum(), torch.tensor(2.0 * len(folded)).double(), **EXACT
        )
    assert set(range(3)) <= set(state.window_positions)


@pytest.mark.parametrize("interval", [1, 8])
def test_a_query_sees_the_stated_number_of_window_tokens(interval):
    """With an empty cache and g = 1 the output is softmax over the window alone."""
    problem = make_problem(40, config(update_interval=interval, sparse_cache_size=0))
    problem.window_factors[:] = 1e4
    out, _ = problem.reference()
    for t in (8, 15, 16, 23, 24, 39):
        seen = 9 if interval == 1 else 9 + t % 8
        k, v = problem.k[t + 1 - seen : t + 1, 0], problem.v[t + 1 - seen : t + 1, 0]
        y = (k @ problem.q[t, 0] / 4).softmax(0) @ v
        torch.testing.assert_close(out[t, 0], y, rtol=1e-6, atol=1e-6)


def test_the_cache_holds_what_the_state_cannot_recall():
    """A pair that the hidden state predicts badly outlives pairs that it predicts well."""
    cfg = config(window_size=2, sparse_cache_size=1, update_interval=1)
    problem = make_problem(60, cfg, Hkv=1, group=1)
    problem.v[:] = 1.0
    problem.v[17] = -9.0
    _, state = problem.reference()
    assert state.sparse_positions == [[17]]


def shared_cache(problem, relative):
    """The sparse cache of one KV head that all state heads share, from what was folded so far."""
    cfg, T = problem.config, len(problem.q)
    cache, folded, start = [], [], 0
    for n in range(cfg.update_interval, T + 1, cfg.update_interval):
        stop = max(n - cfg.window_size, 0)
        pairs, start = [*cache, *range(start, stop)], stop
        scores = {}
        for j in pairs:
            v, total = problem.v[j, 0], 0.0
            for W in problem.feature_map_k:
                phi_j = feature_map(problem.k[j, 0], W)
                weights = [float(phi_j @ feature_map(problem.k[i, 0], W)) for i in folded]
                recalled = sum(w * problem.v[i, 0] for w, i in zip(weights, folded, strict=True))
                error = (v - recalled / (sum(weights) + 1e-6)).norm()
                total += float(error / v.norm() if relative else error)
            scores[j] = total / len(problem.feature_map_k)
        pairs.sort(key=lambda j: (-scores[j], j))
        cache = sorted(pairs[: cfg.sparse_cache_size])
        folded += pairs[cfg.sparse_cache_size :]
    return cache


def test_a_shared_set_keeps_the_largest_mean_of_relative_errors():
    """Section 6: SRE / ||v||, averaged over the state heads of a set. Lengths of values vary."""
    cfg = config(update_interval=5, sparse_sharing="kv_head", sparse_cache_size=6)
    problem = make_problem(50, cfg, Hkv=1, group=3, Hs=3)
    problem.v *= torch.rand(50, 1, 1, generator=torch.Generator().manual_seed(1)) * 9 + 1
    _, state = problem.reference()
    expected = shared_cache(problem, relative=True)
    assert state.sparse_positions == [expected] * 3
    assert expected != shared_cache(problem, relative=False)  # the lengths decide some of them


def test_relative_errors_of_an_empty_state_are_equal():
    """Each is ||v|| / ||v||, so the oldest pair stays however short its value is."""
    cfg = config(window_size=2, sparse_cache_size=1, update_interval=4, sparse_sharing="kv_head")
    problem = make_problem(4, cfg, Hkv=1, group=2, Hs=2)
    problem.v[1] = problem.v[0] * 9
    assert problem.reference()[1].sparse_positions == [[0], [0]]


def test_an_importance_is_what_its_formula_says():
    gen = torch.Generator().manual_seed(0)
    k, v, weights = (torch.randn(n, generator=gen).double() for n in (7, 7, 3 + 7 + 1))
    log = weights[10] + sum(weights[3 + i] * v[i] for i in range(7))
    log += sum(weights[i] * (k[i] ** 2 + k[i + 3] ** 2) ** 0.5 for i in range(3))
    torch.testing.assert_close(pair_importance(k, v, weights), log.exp(), **EXACT)
    for bias, least in ((1e4, 20.0), (-1e4, -20.0)):
        weights[10] = bias
        assert pair_importance(k, v, weights).log().item() == pytest.approx(least)
    assert pair_importance(k, v * torch.nan, weights).isnan()


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("sharing", ["none", "kv_head"])
def test_a_pair_of_large_importance_stays(interval, sharing):
    """However well the hidden state recalls it; in the KV head whose weights say so, alone."""
    cfg = config(update_interval=interval, sparse_sharing=sharing)
    problem = make_problem(60, cfg, Hs=6, importance=True)
    problem.importance[:] = 0
    plain = problem.reference()[1].sparse_positions
    assert plain == replace(problem, importance=None).reference()[1].sparse_positions
    gone = next(t for t in range(9, 40) if not any(t in held for held in plain))
    problem.k[gone, :, 3], problem.k[gone, :, 3 + 8] = 30.0, 40.0
    unweighted = replace(problem, importance=None).reference()[1].sparse_positions
    assert not any(gone in held for held in unweighted)
    problem.importance[1, 3] = 0.3  # 0.3 * 50 = 15
    held = problem.reference()[1].sparse_positions
    assert [gone in positions for positions in held] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
def test_no_nan_at_logits_of_a_hundred(mixing):
    problem = make_problem(40, config(mixing=mixing), dtype=torch.float32, scale=6.0)
    out, _ = lola_attention(
        problem.q, problem.k, problem.v, problem.feature_map_q, problem.feature_map_k,
        problem.window_factors, problem.config,
    )  # fmt: skip
    assert out.dtype == torch.float32 and out.isfinite().all()
    torch.testing.assert_close(out.double(), problem.reference()[0], rtol=1e-3, atol=1e-3)
