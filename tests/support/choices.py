"""Long problems in which pairs leave again and again, and what must choose alike."""

from __future__ import annotations

from typing import Any

import torch

from lola_vllm.core.config import LolaConfig
from lola_vllm.core.ops import portable
from tests.support.backends import Backend
from tests.support.pages import assert_bounds_hold, assert_same_choices
from tests.support.problem import STATE_INDEX, Problem, run, with_a_trend

# What two runs of the same arithmetic leave in a page to the last bit.
STORED = (
    "positions", "score_weights", "sparse_k_scale", "sparse_v_scale", "sparse_k", "sparse_v", "H",
    "s",
)  # fmt: skip


def per_token_problem(
    backend: Backend, T: int, config: LolaConfig, dtype: torch.dtype, d: int, **options: Any
) -> Problem:
    """For an interval of 1: long enough, most scores are bounded. Of one head where it is slow."""
    group = 2 if config.sparse_sharing == "kv_head" else 1
    Hkv = 1 if backend.pace == "interpreted" else 2
    return with_a_trend(
        T,
        config,
        dtype=dtype,
        d=d,
        Hkv=Hkv,
        group=group,
        Hs=Hkv * group,
        scale=(16 / d) ** 0.5,
        **options,
    )


def assert_bounds_choose_as_scores(backend: Backend, problem: Problem) -> None:
    """A back end that bounds scores keeps what the portable one keeps, which computes them all."""
    decode_from = len(problem.q) // 5 if backend.prefills else 0
    _, kept = backend.run(problem, [30, 31], decode_from=decode_from)
    _, direct = run(portable, problem)
    assert_same_choices(kept, direct)
    assert_bounds_hold(problem, kept)


def assert_a_prompt_chooses_as_single_steps(backend: Backend, problem: Problem) -> None:
    """A prefill leaves what decode steps leave, to the last bit."""
    _, carried = backend.run(problem, [700])
    _, stepwise = backend.run(problem, decode_from=0)
    for name in STORED:
        one, two = (getattr(x.groups[0].views, name)[STATE_INDEX] for x in (carried, stepwise))
        assert torch.equal(one, two), name
