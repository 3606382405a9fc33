"""Sequences longer than the base's trained length: context shifts, as the reference has them."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from tests.support.backends import fewer
from tests.support.problem import make_problem

SCHEDULE = ShiftSchedule(length=32, interval=8)
T = 61  # four context shifts: before the tokens at 32, 40, 48 and 56


def config_of(lam=5, interval=4, sink=3, window=6, **others):
    return LolaConfig(
        window_size=window, sparse_cache_size=lam, update_interval=interval,
        sink_size=sink, **others,
    )  # fmt: skip


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 3, 4, 8])  # 3 has no update at a context shift
@pytest.mark.parametrize("lam", [0, 5, 100])
@pytest.mark.parametrize("sink", [0, 3])
@fewer("interpreted", interval=[1, 4], lam=[5], sink=[3])
def test_prompts_and_decodes_across_context_shifts(backend, interval, lam, sink):
    problem = make_problem(
        T, config_of(lam, interval, sink), dtype=backend.dtype, schedule=SCHEDULE, seed=lam
    )
    truth = problem.reference()
    for decode_from in (40, T) if backend.pace == "interpreted" else (39, 40, 41, T):
        backend.check(problem, [15], decode_from=decode_from, truth=truth)


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("lam", [0, 5])
@pytest.mark.parametrize("further", [0, 2])
@fewer("interpreted", interval=[], lam=[])
def test_decodes_across_context_shifts(backend, interval, lam, further):
    schedule = replace(SCHEDULE, fold_rotation=further)
    problem = make_problem(T, config_of(lam, interval), dtype=backend.dtype, schedule=schedule)
    backend.check(problem, decode_from=20)


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize(
    "decay", [1.0, 20.0]
)  # 20: a pair of before a context shift has hardly a chance
@fewer("interpreted", interval=[4], importance=[False], decay=[20.0])
def test_scores_decay(backend, interval, importance, decay):
    config = config_of(5, interval, context_shift=8)
    schedule = replace(SCHEDULE, score_decay=decay)
    problem = make_problem(
        T, config, importance=importance, dtype=backend.dtype, schedule=schedule, seed=3
    )
    truth = problem.reference()
    steady = replace(problem, rotation=replace(problem.rotation, schedule=SCHEDULE)).reference()
    assert truth[1].sparse_positions != steady[1].sparse_positions  # so a choice depends on it
    for decode_from in (40,) if backend.pace == "interpreted" else (39, 40, T):
        backend.check(problem, [15], decode_from=decode_from, truth=truth)


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("importance", [False, True])
@fewer("interpreted", interval=[4], importance=[True])
def test_scores_decay_at_a_pairs_first_context_shifts_only(backend, interval, importance):
    config = config_of(5, interval, context_shift=8)
    schedule = replace(SCHEDULE, score_decay=2.0, score_decay_shifts=1)
    problem = make_problem(
        T, config, importance=importance, dtype=backend.dtype, schedule=schedule, seed=5
    )
    truth = problem.reference()
    for other in (None, 4):  # at all, of which there are 4 here
        more = replace(schedule, score_decay_shifts=other)
        decayed = replace(problem, rotation=replace(problem.rotation, schedule=more)).reference()
        assert truth[1].sparse_positions != decayed[1].sparse_positions
    for decode_from in (40,) if backend.pace == "interpreted" else (39, 40, T):
        backend.check(problem, [15], decode_from=decode_from, truth=truth)


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 3, 4])
@pytest.mark.parametrize("lam", [0, 5])
@pytest.mark.parametrize("further", [1, 3])
@pytest.mark.parametrize("importance", [False, True])
@fewer("interpreted", interval=[1, 4], lam=[5], further=[3], importance=[True])
def test_keys_are_rotated_further_for_folds(backend, interval, lam, further, importance):
    config = config_of(lam, interval)
    schedule = replace(SCHEDULE, fold_rotation=further)
    problem = make_problem(
        T, config, importance=importance, dtype=backend.dtype, schedule=schedule, seed=lam
    )
    truth = problem.reference()
    exact = replace(problem, rotation=replace(problem.rotation, schedule=SCHEDULE)).reference()
    assert not torch.allclose(truth[1].H, exact[1].H, rtol=0.05)  # so it matters
    for decode_from in (40,) if backend.pace == "interpreted" else (20, 33, 40, T):
        backend.check(problem, [15], decode_from=decode_from, truth=truth)


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("start", [3, 16])
@pytest.mark.parametrize("window", [6, 30])  # 30: the window reaches into the bucket
@fewer("interpreted", interval=[4], start=[16], window=[6])
def test_old_pairs_stay_at_the_start_of_the_bucket(backend, interval, start, window):
    config = config_of(7, interval, window=window)
    schedule = replace(SCHEDULE, fold_rotation=1, bucket_start=start)
    problem = make_problem(75, config, dtype=backend.dtype, schedule=schedule, seed=start)
    truth = problem.reference()
    at_zero = replace(schedule, bucket_start=0)
    other = replace(problem, rotation=replace(problem.rotation, schedule=at_zero)).reference()
    assert not torch.allclose(truth[0][SCHEDULE.length :], other[0][SCHEDULE.length :], rtol=0.05)
    for decode_from in (50,) if backend.pace == "interpreted" else (33, 50, 75):
        backend.check(problem, [39], decode_from=decode_from, truth=truth)


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@fewer("interpreted", interval=[4])
def test_keys_are_rotated_further_for_folds_of_shared_sets_int8_and_partial_rotary(
    backend, interval
):
    config = config_of(7, interval, 2, sparse_sharing="kv_head", sparse_dtype="int8")
    schedule = replace(SCHEDULE, fold_rotation=2, bucket_start=8)
    problem = make_problem(75, config, Hs=6, dtype=backend.dtype, schedule=schedule, rotated=10)
    backend.check(problem, [39], decode_from=50)


@pytest.mark.prompts
@pytest.mark.parametrize("interval", [1, 4])
@fewer("interpreted", interval=[4])
def test_nothing_changes_up_to_the_trained_length(backend, interval):
    schedule = replace(SCHEDULE, fold_rotation=2, bucket_start=8)
    # With an importance pages have room for weights of scores whether contexts shift or not.
    problem = make_problem(
        32, config_of(5, interval), dtype=backend.dtype, schedule=schedule, importance=True
    )
    for decode_from in (32, 20):
        out, state = backend.run(problem, decode_from=decode_from)
        plain, other = backend.run(replace(problem, rotation=None), decode_from=decode_from)
        assert torch.equal(out, plain)
        assert torch.equal(state.pages, other.pages)


@pytest.mark.prompts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@fewer("interpreted", dtype=[torch.bfloat16])
def test_narrow_keys(backend, dtype):
    """With a cache that holds all: keys that are rounded as they rotate choose no other pairs."""
    problem = make_problem(T, config_of(100), dtype=dtype, schedule=SCHEDULE, scale=0.5)
    backend.check(problem, [15], decode_from=50)


def test_a_page_is_shifted_once_and_when_its_next_token_comes():
    for context, count in [(0, 100), (31, 1), (32, 1), (30, 60), (40, 8), (41, 7), (5, 0)]:
        lengths = SCHEDULE.segment_lengths(context, count)
        assert sum(lengths) == count
        ends = [context]
        for length in lengths:
            ends.append(ends[-1] + length)
        inner = [n for n in range(context + 1, context + count) if SCHEDULE.due(n)]
        assert ends[1:-1] == inner
        assert all(a < b for a, b in pairwise(ends))


def test_a_pair_decays_at_as_many_context_shifts_as_it_is_told():
    schedule = replace(SCHEDULE, score_decay=1.0, score_decay_shifts=2)
    positions = torch.tensor([0, 31, 32, 39, 40, 100])
    weights = torch.ones(len(positions))
    met = []
    for n in range(200):
        if schedule.due(n):
            there = positions < n
            factors = schedule.score_decay_factors(positions, torch.tensor(n))
            weights = torch.where(there, weights * factors, weights)
            met.append(n)
    assert met[:3] == [32, 40, 48]
    torch.testing.assert_close(weights, torch.full_like(weights, 0.75**2))
    forever = replace(schedule, score_decay_shifts=None).score_decay_factors(
        positions, torch.tensor(192)
    )
    assert (forever == 0.75).all()
    odd = replace(schedule, score_decay=0.3).score_decay_factors(positions, torch.tensor(32))
    assert odd.tolist() == [0.75**0.3] * len(positions)  # no rounding to float32
