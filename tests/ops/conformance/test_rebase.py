"""Sequences longer than the base's trained length: rebases, as the reference has them."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lola_vllm.config import LolaConfig
from lola_vllm.ops import DecodeBatch, PrefillBatch, rebase
from lola_vllm.ops.places import Places
from tests.support.backends import fewer, only
from tests.support.pages import assert_bounds_hold, assert_state_matches
from tests.support.problem import SLOT, make_problem, prefill, run

PLACES = Places(length=32, interval=8)
T = 61  # four rebases: before the tokens at 32, 40, 48 and 56
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def config_of(lam=5, interval=4, sink=3, window=6, **others):
    return LolaConfig(
        window_size=window, sparse_cache_size=lam, update_interval=interval, feature_dim=8,
        sink_size=sink, **others,
    )  # fmt: skip


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 3, 4, 8])  # 3 has no update at a rebase
@pytest.mark.parametrize("lam", [0, 5, 100])
@pytest.mark.parametrize("sink", [0, 3])
@fewer("interpreted", interval=[1, 4], lam=[5], sink=[3])
def test_prompts_and_decodes_across_rebases(backend, interval, lam, sink):
    problem = make_problem(
        T, config_of(lam, interval, sink), dtype=backend.dtype, places=PLACES, seed=lam
    )
    truth = problem.reference()
    for decode_from in (40, T) if backend.pace == "interpreted" else (39, 40, 41, T):
        backend.check(problem, [15], decode_from=decode_from, truth=truth)


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("lam", [0, 5])
@pytest.mark.parametrize("ahead", [0, 2])
@fewer("interpreted", interval=[], lam=[])
def test_decodes_across_rebases(backend, interval, lam, ahead):
    places = replace(PLACES, fold_ahead=ahead)
    problem = make_problem(T, config_of(lam, interval), dtype=backend.dtype, places=places)
    backend.check(problem, decode_from=20)


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("saliency", [False, True])
@pytest.mark.parametrize("fade", [1.0, 20.0])  # 20: a pair of before a rebase has hardly a chance
@fewer("interpreted", interval=[4], saliency=[False], fade=[20.0])
def test_scores_fade(backend, interval, saliency, fade):
    config = config_of(5, interval, saliency=saliency, rebase_interval=8, score_fade=fade)
    places = replace(PLACES, score_fade=fade)
    problem = make_problem(T, config, dtype=backend.dtype, places=places, seed=3)
    truth = problem.reference()
    steady = replace(problem, turn=replace(problem.turn, places=PLACES)).reference()
    assert truth[1].sparse_positions != steady[1].sparse_positions  # so a choice depends on it
    for decode_from in (40,) if backend.pace == "interpreted" else (39, 40, T):
        backend.check(problem, [15], decode_from=decode_from, truth=truth)


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("saliency", [False, True])
@fewer("interpreted", interval=[4], saliency=[True])
def test_scores_fade_at_a_pairs_first_rebases_only(backend, interval, saliency):
    config = config_of(5, interval, saliency=saliency, rebase_interval=8, score_fade=2.0)
    places = replace(PLACES, score_fade=2.0, score_fade_rebases=1)
    problem = make_problem(T, config, dtype=backend.dtype, places=places, seed=5)
    truth = problem.reference()
    for other in (None, 4):  # at all, of which there are 4 here
        more = replace(places, score_fade_rebases=other)
        faded = replace(problem, turn=replace(problem.turn, places=more)).reference()
        assert truth[1].sparse_positions != faded[1].sparse_positions
    for decode_from in (40,) if backend.pace == "interpreted" else (39, 40, T):
        backend.check(problem, [15], decode_from=decode_from, truth=truth)


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 3, 4])
@pytest.mark.parametrize("lam", [0, 5])
@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("saliency", [False, True])
@fewer("interpreted", interval=[1, 4], lam=[5], ahead=[3], saliency=[True])
def test_keys_are_folded_ahead(backend, interval, lam, ahead, saliency):
    config = config_of(lam, interval, saliency=saliency)
    places = replace(PLACES, fold_ahead=ahead)
    problem = make_problem(T, config, dtype=backend.dtype, places=places, seed=lam)
    truth = problem.reference()
    exact = replace(problem, turn=replace(problem.turn, places=PLACES)).reference()
    assert not torch.allclose(truth[1].H, exact[1].H, rtol=0.05)  # so it matters
    for decode_from in (40,) if backend.pace == "interpreted" else (20, 33, 40, T):
        backend.check(problem, [15], decode_from=decode_from, truth=truth)


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("start", [3, 16])
@pytest.mark.parametrize("window", [6, 30])  # 30: the window reaches into the far zone
@fewer("interpreted", interval=[4], start=[16], window=[6])
def test_old_pairs_rest_at_the_start_of_the_far_zone(backend, interval, start, window):
    config = config_of(7, interval, window=window)
    places = replace(PLACES, fold_ahead=1, far_zone_start=start)
    problem = make_problem(75, config, dtype=backend.dtype, places=places, seed=start)
    truth = problem.reference()
    at_zero = replace(places, far_zone_start=0)
    other = replace(problem, turn=replace(problem.turn, places=at_zero)).reference()
    assert not torch.allclose(truth[0][PLACES.length :], other[0][PLACES.length :], rtol=0.05)
    for decode_from in (50,) if backend.pace == "interpreted" else (33, 50, 75):
        backend.check(problem, [39], decode_from=decode_from, truth=truth)


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@fewer("interpreted", interval=[4])
def test_keys_are_folded_ahead_of_shared_sets_int8_and_partial_rotary(backend, interval):
    config = config_of(7, interval, 2, sparse_sharing="kv_head", sparse_dtype="int8")
    places = replace(PLACES, fold_ahead=2, far_zone_start=8)
    problem = make_problem(75, config, Hs=6, dtype=backend.dtype, places=places, turned=10)
    backend.check(problem, [39], decode_from=50)


@pytest.mark.prompts
@pytest.mark.parametrize("seed", range(4))
@fewer("interpreted", seed=[])
def test_any_split_gives_the_same_state(backend, seed):
    rng = random.Random(seed)
    interval = rng.choice([1, 4, 5, 8])
    places = replace(PLACES, fold_ahead=seed % 2, far_zone_start=5 * (seed // 2))
    problem = make_problem(T, config_of(5, interval), dtype=backend.dtype, places=places)
    cuts = rng.sample(range(1, T), 8)
    backend.check(problem, cuts, decode_from=rng.choice([33, 45, T]))


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@fewer("interpreted", interval=[4])
def test_nothing_changes_up_to_the_trained_length(backend, interval):
    places = replace(PLACES, fold_ahead=2, far_zone_start=8)
    problem = make_problem(32, config_of(5, interval), dtype=backend.dtype, places=places)
    for decode_from in (32, 20):
        out, state = backend.run(problem, decode_from=decode_from)
        plain, other = backend.run(replace(problem, turn=None), decode_from=decode_from)
        assert torch.equal(out, plain)
        assert torch.equal(state.pages, other.pages)


@pytest.mark.prompts
@pytest.mark.parametrize("window", [6, 30])  # 30: the window reaches into the far zone
@pytest.mark.parametrize("shared", [False, True])
@fewer("interpreted", window=[30], shared=[True])
def test_long_windows_shared_sets_and_partial_rotary(backend, window, shared):
    sharing = {"sparse_sharing": "kv_head"} if shared else {}
    for interval in (4,) if backend.pace == "interpreted" else (1, 4):
        config = config_of(7, interval, 2, window, **sharing)
        problem = make_problem(
            75, config, Hs=6 if shared else 2, dtype=backend.dtype, places=PLACES, turned=10
        )
        backend.check(problem, [39], decode_from=50)


@pytest.mark.prompts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@fewer("interpreted", dtype=[torch.bfloat16])
def test_narrow_keys(backend, dtype):
    """With a cache that holds all: keys that are rounded as they turn choose no other pairs."""
    problem = make_problem(T, config_of(100), dtype=dtype, places=PLACES, scale=0.5)
    backend.check(problem, [15], decode_from=50)


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@fewer("interpreted", interval=[4])
def test_rows_that_cross_different_points(backend, interval):
    """Rows of one call, and padding that claims to be due, are as each row alone."""
    device = backend.device
    # Tokens in the page, new ones, slot.
    batch = [(30, 30, 3), (40, 9, 0), (0, 45, 1), (32, 1, -1), (31, 1, 4), (40, 8, 6), (56, 0, 5)]
    config, places = config_of(5, interval), replace(PLACES, fold_ahead=1)
    rows = [
        make_problem(old + new, config, dtype=backend.dtype, seed=old, places=places)
        for old, new, _ in batch
    ]
    rows = [row.of_layer(rows[0]) for row in rows]
    there = [row.to(device) for row in rows]
    state = there[0].state(num_pages=8)
    for row, (old, _, slot) in zip(there, batch, strict=True):
        if slot > 0 and old:
            prefill(backend, row, state, 0, old, slot)
    idle = state.pages[5].clone()
    parts = [row.tokens(old, old + new) for row, (old, new, _) in zip(there, batch, strict=True)]
    q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
    contexts, lengths, slots = (list(x) for x in zip(*batch, strict=True))
    out = torch.full_like(q, torch.nan)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    call = PrefillBatch(torch.tensor(slots, device=device), starts, torch.tensor(contexts))
    rebase.prefill(backend.prefill, state, q, k, v, rebase.cut(places, call), out)
    assert torch.equal(state.pages[5], idle)  # at a point, but with no token after it
    pages = state.pages.cpu()
    state = rows[0].bind(pages)
    for row, answer, (old, _, slot) in zip(rows, out.cpu().split(lengths), batch, strict=True):
        if slot <= 0:
            assert (answer == 0).all()
            continue
        expected, final = row.reference()
        torch.testing.assert_close(answer.double(), expected[old:], **backend.close)
        assert_state_matches(row, state, slot=slot, expected=final, **CLOSE)
    assert all((pages[page] == 0xFF).all() for page in (0, 2, 7))


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@fewer("interpreted", interval=[4])
def test_rows_decode_as_each_alone(backend, interval):
    """Some due and some not, and padding: the same bytes as by itself."""
    device, counts, slots = backend.device, [32, 33, 40, 32, 20], [3, 1, 6, 0, 5]
    config, places = config_of(5, interval), replace(PLACES, fold_ahead=1)
    rows = [
        make_problem(n + 1, config, dtype=backend.dtype, seed=i, places=places)
        for i, n in enumerate(counts)
    ]
    there = [row.of_layer(rows[0]).to(device) for row in rows]
    state = there[0].state(num_pages=8)
    for row, n, slot in zip(there, counts, slots, strict=True):
        if slot > 0:
            prefill(backend, row, state, 0, n, slot)
    parts = [row.tokens(n, n + 1) for row, n in zip(there, counts, strict=True)]
    q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
    slots_t, seen = torch.tensor(slots, device=device), torch.tensor(counts)
    out = torch.full_like(q, torch.nan)
    due = rebase.Due.of(places, slots_t, seen)
    assert due is not None
    rebase.rebase(state, *due)
    backend.decode(state, q, k, v, DecodeBatch(slots_t, (seen + 1).to(device)), out)
    pages = state.pages.cpu()
    for row, n, slot, answer in zip(there, counts, slots, out.cpu(), strict=True):
        if slot > 0:
            alone, other = run(backend, row.to(torch.device("cpu")), decode_from=n, device=device)
            size = state.layout.page_bytes
            assert torch.equal(answer, alone[-1])
            assert torch.equal(pages[slot, :size], other.pages[SLOT, :size])
    assert all((pages[page] == 0xFF).all() for page in (0, 2, 4, 7))


@pytest.mark.prompts
@only("native", "native-threads", "cuda", "triton")
def test_bounds_hold_after_rebases(backend):
    """Interval 1: what a rebase does to H and s must not leave a bound that is too high."""
    config = config_of(12, 1, 0, 8)
    places = Places(length=200, interval=50)
    problem = make_problem(330, config, dtype=backend.dtype, places=places)
    _, state = backend.check(problem, decode_from=320)
    assert_bounds_hold(problem, state)


def test_a_page_is_rebased_once_and_when_its_next_token_comes():
    for context, count in [(0, 100), (31, 1), (32, 1), (30, 60), (40, 8), (41, 7), (5, 0)]:
        lengths = PLACES.segments(context, count)
        assert sum(lengths) == count
        ends = [context]
        for length in lengths:
            ends.append(ends[-1] + length)
        inner = [n for n in range(context + 1, context + count) if PLACES.due(n)]
        assert ends[1:-1] == inner
        assert all(a < b for a, b in pairwise(ends))


def test_a_pair_fades_at_as_many_rebases_as_it_is_told():
    places = replace(PLACES, score_fade=1.0, score_fade_rebases=2)
    positions = torch.tensor([0, 31, 32, 39, 40, 100])
    weights = torch.ones(len(positions))
    met = []
    for n in range(200):
        if places.due(n):
            there = positions < n
            factors = places.score_factors(positions, torch.tensor(n))
            weights = torch.where(there, weights * factors, weights)
            met.append(n)
    assert met[:3] == [32, 40, 48]
    torch.testing.assert_close(weights, torch.full_like(weights, 0.75**2))
    forever = replace(places, score_fade_rebases=None).score_factors(positions, torch.tensor(192))
    assert (forever == 0.75).all()
    odd = replace(places, score_fade=0.3).score_factors(positions, torch.tensor(32))
    assert odd.tolist() == [0.75**0.3] * len(positions)  # no rounding to float32
