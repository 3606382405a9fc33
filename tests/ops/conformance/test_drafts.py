"""Drafts: tokens that are checked together. A rejected part is taken back by its count."""

import random
from dataclasses import replace

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops.rollback import longest_draft
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from tests.support.backends import TOLERANCE, fewer
from tests.support.pages import assert_state_matches
from tests.support.problem import STATE_INDEX, decode, make_problem, prefill

T = 75
SCHEDULE = ShiftSchedule(length=32, interval=8)


def valid(problem, state):
    """The bytes of the page that are valid after all tokens."""
    page = state.pages[STATE_INDEX].cpu()
    return [page[a:b] for a, b in problem.layout().valid_spans(T)]


def speculate(backend, problem, wrong, state, start, rng, together):
    """Go on from `start` tokens with drafts of random lengths, of which a random part is right."""
    config, answers, n, checked = problem.config, [], start, set()
    while n < T:
        # n tokens are computed; the next is known, and drafts follow it.
        longest = longest_draft(n + 1, config.update_interval, problem.schedule)
        count = min(rng.choice([longest, rng.randint(0, longest)]), T - n - 1)
        accepted = rng.choice([0, count, rng.randint(0, count)])
        if not count:
            answers.append(decode(backend, problem, state, n))
        else:
            mixed = replace(problem)
            for name in ("q", "k", "v"):
                tokens = getattr(problem, name).clone()
                first, last = n + 1 + accepted, n + 1 + count
                tokens[first:last] = getattr(wrong, name)[first:last]
                setattr(mixed, name, tokens)
            stop = n + 1 + count
            if together:
                out = prefill(backend, mixed, state, n, stop)
            else:
                out = torch.cat([decode(backend, mixed, state, t) for t in range(n, stop)])
            answers.append(out[: 1 + accepted])
        checked.add(count - accepted)
        n += 1 + accepted
    assert max(checked) > 1 and 0 in checked
    return torch.cat(answers)


@pytest.mark.prompts
@pytest.mark.parametrize("together", [False, True], ids=["decoded", "prefilled"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("schedule", [None, SCHEDULE], ids=["no-shifts", "shifts"])
@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("interval", [5, 8])
@fewer("interpreted", interval=[], seed=[])
def test_rejected_drafts_leave_nothing(backend, interval, sink, schedule, seed, together):
    """Valid bytes of the page and answers are those of tokens decoded one by one."""
    config = LolaConfig(
        window_size=6, sparse_cache_size=5, update_interval=interval, sink_size=sink
    )
    problem, wrong = (
        make_problem(T, config, dtype=backend.dtype, schedule=schedule, seed=s).to(backend.device)
        for s in (seed, 100 + seed)
    )
    rng = random.Random(seed)
    start = rng.randint(1, 20)
    plain, drafted = problem.state(), problem.state()
    for state in (plain, drafted):
        prefill(backend, problem, state, 0, start)
    one_by_one = [decode(backend, problem, plain, t) for t in range(start, T)]
    answers = speculate(backend, problem, wrong, drafted, start, rng, together)
    close = TOLERANCE[backend.dtype] if together else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(answers, torch.cat(one_by_one), **close)
    for found, expected in zip(valid(problem, drafted), valid(problem, plain), strict=True):
        assert torch.equal(found, expected)
    close = TOLERANCE[torch.promote_types(backend.dtype, torch.float32)]
    assert_state_matches(problem, problem.bind(drafted.pages), **close)
