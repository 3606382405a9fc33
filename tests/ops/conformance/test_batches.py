"""Prompts in pieces, rows beside each other, padding, and inputs that are slices."""

import random
from dataclasses import replace

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import DecodeBatch, PrefillBatch, context_shift, portable
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from tests.support.backends import fewer, only
from tests.support.pages import assert_state_matches
from tests.support.problem import make_problem, prefill

ETA = 10
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SPLITS = [([], 60), ([7, 14, 21], 60), ([1, 2, 3, 20, 33], 50), ([16], 17), (range(60), 60)]
RANDOM = list(range(8))


@pytest.mark.prompts
@pytest.mark.parametrize("cuts, decode_from", SPLITS, ids=lambda x: str(x))
def test_any_split_gives_the_same_state(backend, cuts, decode_from):
    config = LolaConfig(window_size=ETA, sparse_cache_size=8, update_interval=7)
    problem = make_problem(60, config, group=1, dtype=backend.dtype)
    backend.check(problem, cuts, decode_from=decode_from)


@pytest.mark.prompts
@pytest.mark.parametrize("seed", RANDOM)
@fewer("interpreted", seed=[])
def test_any_random_split_gives_the_same_state(backend, seed):
    config = LolaConfig(window_size=ETA, sparse_cache_size=8, update_interval=7)
    problem = make_problem(90, config, dtype=backend.dtype)
    rng = random.Random(seed)
    cuts = rng.sample(range(1, 90), rng.randrange(0, 20))
    backend.check(problem, cuts, decode_from=rng.choice([90, 70]))


@only("torch")
def test_a_long_window_is_cut_into_bounded_chunks(backend, monkeypatch):
    monkeypatch.setattr(portable, "MAX_CHUNK", 16)
    config = LolaConfig(window_size=50, sparse_cache_size=8)
    backend.check(make_problem(160, config))


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
@fewer("interpreted", parts=[1, 2], wide=[torch.int32])
def test_rows_are_independent_and_padding_touches_nothing(backend, wide, parts):
    """q, k and v are slices of one projection and state_indices a column of a table, as vLLM has
    them."""
    backend, device = backend.cut_in(parts), backend.device
    config = LolaConfig(window_size=ETA, sparse_cache_size=5, update_interval=7, sink_size=2)
    counts = [1, 14, 9, 10, 23, 57]  # row 1 is padding, and at an update point
    live = (0, 2, 3, 4, 5)
    rows = [make_problem(T + 3, config, dtype=backend.dtype, seed=T) for T in counts]
    rows = [row.of_layer(rows[0]) for row in rows]
    state = rows[0].to(device).state(num_pages=8)
    state_indices = torch.tensor([[3, 9], [0, 9], [1, 9], [7, 9], [5, 9], [4, 9]], dtype=wide)
    state_indices = state_indices.to(device)[:, 0]

    def pack(first, last):
        """Of each row the tokens `first(count)` to `last(count) - 1`, and answers to be written."""
        parts = [
            torch.cat([x.flatten(1) for x in row.tokens(first(c), last(c))], 1)
            for row, c in zip(rows, counts, strict=True)
        ]
        q, k, v = torch.cat(parts).to(device).unflatten(1, (-1, 16)).split([6, 2, 2], dim=1)
        return q, k, v, torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)

    starts = torch.tensor([0, *counts]).cumsum(0)
    *tokens, out = pack(lambda c: 0, lambda c: c)
    nothing = torch.zeros(6, dtype=torch.int32)
    backend.prefill(state, *tokens, PrefillBatch(state_indices, starts, nothing), out)
    assert (out[1:15] == 0).all()
    answers = [[x] for x in out.cpu().split(counts)]
    for step in range(3):
        *tokens, out = pack(lambda c, at=step: c + at, lambda c, at=step: c + at + 1)
        seq_lens = torch.tensor(counts, dtype=wide) + step + 1
        seq_lens[1] = 14 * step  # a count means nothing without a page, due for an update or not
        backend.decode(state, *tokens, DecodeBatch(state_indices, seq_lens.to(device)), out)
        assert (out[1] == 0).all()
        for row, answer in zip(answers, out.cpu().split(1), strict=True):
            row.append(answer)
    pages = state.pages.cpu()
    state = rows[0].state(num_pages=8)
    state.pages.copy_(pages)
    for i in live:
        expected, final = rows[i].reference()
        torch.testing.assert_close(torch.cat(answers[i]).double(), expected, **backend.close)
        assert_state_matches(
            rows[i], state, state_index=int(state_indices[i]), expected=final, **CLOSE
        )
    for page in (0, 2, 6):
        assert (pages[page] == 0xFF).all()


# Tokens in the page, new ones, state_index. With context shifts the rows cross different points.
RAGGED = [(13, 20, 3), (25, 9, 0), (0, 16, 1), (8, 30, -1), (41, 1, 4), (1, 30, 6), (7, 0, 5)]
CROSSING = [(30, 30, 3), (40, 9, 0), (0, 45, 1), (32, 1, -1), (31, 1, 4), (40, 8, 6), (56, 0, 5)]
SCHEDULE = ShiftSchedule(length=32, interval=8, fold_rotation=1)


@pytest.mark.prompts
@pytest.mark.parametrize(
    "interval, lam, sink, Hs, schedule",
    [
        (7, 0, 0, 2, None), (7, 5, 2, 2, None), (7, 5, 2, 6, None), (7, 100, 3, 2, None),
        (1, 5, 3, 2, SCHEDULE), (4, 5, 3, 2, SCHEDULE),
    ],
)  # fmt: skip
def test_ragged_rows_go_on_with_pages_in_use(backend, interval, lam, sink, Hs, schedule):
    """Beside padding that claims tokens of a page of NaN, and to be due."""
    device, batch = backend.device, CROSSING if schedule else RAGGED
    config = LolaConfig(
        window_size=ETA, sparse_cache_size=lam, update_interval=interval, sink_size=sink
    )
    rows = [
        make_problem(old + new, config, Hs=Hs, dtype=backend.dtype, seed=old, schedule=schedule)
        for old, new, _ in batch
    ]
    rows = [row.of_layer(rows[0]) for row in rows]
    there = [row.to(device) for row in rows]
    state = there[0].state(num_pages=8, extra_stride=64)
    for row, (old, _, state_index) in zip(there, batch, strict=True):
        if state_index > 0 and old:
            prefill(backend, row, state, 0, old, state_index)
    idle = state.pages[5].clone()
    parts = [row.tokens(old, old + new) for row, (old, new, _) in zip(there, batch, strict=True)]
    q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
    contexts, lengths, state_indices = (list(x) for x in zip(*batch, strict=True))
    out = torch.full_like(q, torch.nan)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    call = PrefillBatch(torch.tensor(state_indices, device=device), starts, torch.tensor(contexts))
    segments = context_shift.split_prefill(schedule, call)
    context_shift.prefill(backend.prefill, state, q, k, v, segments, out)
    assert torch.equal(state.pages[5], idle)  # at a point, but with no token after it
    pages = state.pages.cpu()
    state = rows[0].bind(pages)
    for row, answer, (old, _, state_index) in zip(
        rows, out.cpu().split(lengths), batch, strict=True
    ):
        if state_index <= 0:
            assert (answer == 0).all()
            continue
        expected, final = row.reference()
        torch.testing.assert_close(answer.double(), expected[old:], **backend.close)
        assert_state_matches(row, state, state_index=state_index, expected=final, **CLOSE)
    assert all((pages[page] == 0xFF).all() for page in (0, 2, 7))


@pytest.mark.prompts
def test_hundreds_of_rows(backend):
    """More than one look at the token counts takes in Triton; few are due at once."""
    config = LolaConfig(window_size=2, sparse_cache_size=1, update_interval=3)
    problem = make_problem(9, config, group=1, Hkv=1, d=4, F=2, dtype=backend.dtype)
    counts = torch.where(torch.arange(300) % 100 == 99, 9, 4)
    tokens = torch.cat([torch.arange(c) for c in counts.tolist()])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    there = problem.to(backend.device)
    state = there.state(num_pages=301)
    out = torch.full_like(there.q[tokens], torch.nan)
    state_indices = torch.arange(1, 301, device=backend.device)
    batch = PrefillBatch(state_indices, starts, torch.zeros(300, dtype=torch.long))
    backend.prefill(state, there.q[tokens], there.k[tokens], there.v[tokens], batch, out)
    expected, final = problem.reference()
    torch.testing.assert_close(out.cpu().double(), expected[tokens], **backend.close)
    pages = state.pages.cpu()
    state = problem.state(num_pages=301)
    state.pages.copy_(pages)
    for state_index in (100, 200, 300):
        assert_state_matches(problem, state, state_index=state_index, expected=final, **CLOSE)


@pytest.mark.parametrize("offset", [0, 1])  # whole vectors, and not
@fewer("interpreted", offset=[1])
def test_inputs_may_be_strided_and_unaligned(backend, offset):
    """q, k and v of vLLM are slices of one projection."""
    config = LolaConfig(window_size=ETA, sparse_cache_size=6, update_interval=4)
    problem = make_problem(24, config, d=64, dtype=torch.bfloat16)
    expected, _ = backend.run(problem, decode_from=18)
    fused = torch.cat([x.flatten(1) for x in problem.tokens(0, 24)], 1)
    fused = torch.nn.functional.pad(fused, (offset, 0), value=torch.nan).to(backend.device)
    Hq, Hkv = problem.q.shape[1], problem.k.shape[1]
    q, k, v = fused[:, offset:].unflatten(1, (-1, 64)).split([Hq, Hkv, Hkv], dim=1)
    out, _ = backend.run(replace(problem, q=q, k=k, v=v), decode_from=18)
    torch.testing.assert_close(out, expected, **backend.tolerance[torch.bfloat16])
