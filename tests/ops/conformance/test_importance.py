"""Choices by weighted scores: a pair's importance is stored with it and multiplies its error."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from lola_vllm.core.config import LolaConfig
from lola_vllm.core.ops import DecodeBatch, PrefillBatch
from tests.support.backends import fewer, only
from tests.support.choices import assert_a_prompt_chooses_as_single_steps
from tests.support.pages import (
    assert_state_matches,
    assert_unrecallable_stay,
)
from tests.support.problem import STATE_INDEX, make_problem, unrecallable, with_a_trend

ETA = 10
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


weighted_problem = partial(make_problem, importance=True)


def config_of(**fields):
    defaults = {"window_size": ETA, "sparse_cache_size": 6}
    return LolaConfig(**defaults | fields)


@pytest.mark.parametrize("interval", [1, 4, 64])
@pytest.mark.parametrize("lam", [0, 1, 5, 100])
@pytest.mark.parametrize("T", [1, ETA, ETA + 1, ETA + 2, 23, 61, 150])
@fewer("emulated", T=[ETA + 1, 61])
@fewer("interpreted", T=[23], lam=[5], interval=[1, 4])
def test_equals_the_reference(backend, T, lam, interval):
    """First evictions, a cache that is not full and one that is, and none."""
    config = config_of(sparse_cache_size=lam, update_interval=interval)
    problem = weighted_problem(T, config, dtype=backend.dtype, seed=T + lam, group=1)
    truth = problem.reference()
    for decode_from in (T, T // 2) if backend.pace == "interpreted" else (T, T // 2, 0):
        backend.check(problem, decode_from=decode_from, truth=truth)


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("Hs, sharing", list(product([2, 6], ["none", "kv_head"])))
@pytest.mark.parametrize("d", [16, 5, 24])  # an odd head: its last entry is in no rotary pair
@fewer("interpreted", d=[5], Hs=[6], sharing=["kv_head"])
def test_heads_and_head_sizes(backend, d, Hs, sharing, interval):
    config = config_of(update_interval=interval, sparse_sharing=sharing, sink_size=3)
    problem = weighted_problem(57, config, Hs=Hs, d=d, dtype=backend.dtype, seed=d)
    decode_from = 50 if backend.prefills else 3
    backend.check(problem, [2, 5, 6, 25], decode_from=decode_from, extra_stride=192)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interval", [1, 8])
@fewer("interpreted", dtype=[torch.bfloat16], interval=[8])
def test_dtypes(backend, dtype, interval):
    """Keys and values are rounded to the dtype; the importance is of float32."""
    config = config_of(window_size=8, update_interval=interval)
    problem = weighted_problem(50, config, d=32, dtype=dtype, scale=0.5, seed=3)
    _, state = backend.check(problem, decode_from=40)
    assert state.groups[0].views.score_weights.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("bias", [1e4, -1e4, 0.0])
@fewer("interpreted", bias=[1e4])
def test_equal_importances_change_no_choice(backend, bias):
    """Also beyond the largest, where all are clamped to e^20 or e^-20."""
    problem = weighted_problem(60, config_of(update_interval=4), dtype=backend.dtype)
    problem.importance[:] = 0
    problem.importance[:, -1] = bias
    _, state = backend.check(problem, decode_from=50 if backend.prefills else 0)
    found = state.groups[0].views.score_weights[STATE_INDEX].double()
    expected = torch.tensor(max(-20.0, min(20.0, bias))).double().exp()
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-5, atol=0)
    plain = replace(problem, importance=None)
    assert state.groups[0].views.positions[STATE_INDEX].sort(-1).values.tolist() == (
        plain.reference()[1].sparse_positions
    )


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("sharing", ["none", "kv_head"])
@fewer("interpreted", interval=[1], sharing=["kv_head"])
def test_scores_that_are_no_numbers_count_as_the_largest(backend, interval, sharing):
    """An infinite value has an importance, one that is NaN makes it NaN."""
    problem = unrecallable(interval, sharing, backend.dtype, importance=True)
    _, state = backend.run(problem, decode_from=20 if backend.prefills else 0)
    assert_unrecallable_stay(problem, state)


@pytest.mark.parametrize("interval", [1, 7])
@fewer("interpreted", interval=[7])
def test_rows_are_independent_however_their_prompts_are_cut(backend, interval):
    """Beside padding, in one call for all rows; then again from pages in use, token by token."""
    device = backend.device
    config = config_of(sparse_cache_size=5, update_interval=interval, sink_size=2)
    counts, state_indices = [14, 23, 57, 9], [3, 1, 5, 0]
    rows = [weighted_problem(T + 2, config, dtype=backend.dtype, seed=T) for T in counts]
    rows = [row.of_layer(rows[0]) for row in rows]
    there = [row.to(device) for row in rows]
    state = there[0].state(num_pages=7)
    column = torch.tensor(state_indices, device=device)

    def call(op, spans, batch):
        tokens = [row.tokens(*span) for row, span in zip(there, spans, strict=True)]
        q, k, v = (torch.cat(x) for x in zip(*tokens, strict=True))
        out = torch.full_like(q, torch.nan)
        op(state, q, k, v, batch, out)
        return out.cpu().split([stop - start for start, stop in spans])

    answers = []
    for first, last in ((0.0, 0.4), (0.4, 1.0)):
        spans = [(int(T * first), int(T * last)) for T in counts]
        starts = torch.tensor([0, *(stop - start for start, stop in spans)]).cumsum(0)
        batch = PrefillBatch(column, starts, torch.tensor([start for start, _ in spans]))
        answers.append(call(backend.prefill, spans, batch))
    for step in range(2):
        spans = [(T + step, T + step + 1) for T in counts]
        lengths = torch.tensor([stop for _, stop in spans], device=device)
        answers.append(call(backend.decode, spans, DecodeBatch(column, lengths)))
    pages = state.pages.cpu()
    state = rows[0].state(num_pages=7)
    state.pages.copy_(pages)
    for i, state_index in enumerate(state_indices):
        found = torch.cat([part[i] for part in answers])
        if state_index == 0:
            assert (found == 0).all()
            continue
        expected, final = rows[i].reference()
        torch.testing.assert_close(found.double(), expected, **backend.close)
        assert_state_matches(rows[i], state, state_index=state_index, expected=final, **CLOSE)
    assert all((pages[page] == 0xFF).all() for page in (0, 2, 4, 6))


@only("cpp")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [32, 20])
def test_a_prompt_makes_the_choices_of_single_steps(backend, dtype, d):
    """C++ prefill carries bounds from update to update; its steps compute all errors."""
    config = config_of(window_size=16, sparse_cache_size=96)
    problem = with_a_trend(2000, config, dtype=dtype, d=d, F=16, group=1, importance=True)
    problem.importance *= 0.3
    assert_a_prompt_chooses_as_single_steps(backend, problem)
