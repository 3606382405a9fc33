"""Long problems in which pairs leave again and again, and what must choose alike."""

from __future__ import annotations

import torch

from tests.support.backends import Backend
from tests.support.problem import STATE_INDEX, Problem

# What two runs of the same arithmetic leave in a page to the last bit.
STORED = (
    "positions", "score_weights", "sparse_k_scale", "sparse_v_scale", "sparse_k", "sparse_v", "H",
    "s",
)  # fmt: skip


def assert_a_prompt_chooses_as_single_steps(backend: Backend, problem: Problem) -> None:
    """A prefill leaves what decode steps leave, to the last bit."""
    _, carried = backend.run(problem, [700])
    _, stepwise = backend.run(problem, decode_from=0)
    for name in STORED:
        one, two = (getattr(x.groups[0].views, name)[STATE_INDEX] for x in (carried, stepwise))
        assert torch.equal(one, two), name
