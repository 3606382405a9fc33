"""Layers whose KV heads have sparse caches of different sizes, or no hidden state: a page each."""

from __future__ import annotations

from typing import Any

import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import LayerState
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import LayerLayout
from tests.support.problem import Problem, make_problem

SIZES = (3, 0, 17)
T = 90
BASE: dict[str, int] = {"window_size": 8, "update_interval": 4, "sink_size": 2}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "as the demo model": {"sparse_dtype": "int8", "context_shift": 16},
    "every token": {"update_interval": 1},
    "long interval": {"update_interval": 16},
    "shared sets": {"sparse_sharing": "kv_head"},
    "shifts alone": {"context_shift": 16},
    "recent pairs": {"recent_size": ((0, 2, 3),), "sparse_dtype": "int8"},
    "every token, recent pairs": {"recent_size": ((0, 0, 3),), "update_interval": 1},
    "some without H": {"hidden_state": ((True, True, False),), "recent_size": 5},
    "one with H": {"hidden_state": ((False, True, False),), "context_shift": 16},
    "shared sets, some without H": {
        "hidden_state": ((False, True, True),),
        "sparse_sharing": "kv_head",
        "sparse_dtype": "int8",
    },
}
WITHOUT_H = ("some without H", "one with H", "shared sets, some without H")
# With an importance.
WEIGHTED = ("as the demo model", "long interval", "some without H", "shared sets, some without H")


def layer(
    kind: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Problem, list[Problem]]:
    """A problem of three KV heads, and the same of each head alone."""
    config = LolaConfig(**{**BASE, **KINDS[kind]}, sparse_cache_size=(SIZES,))
    schedule = ShiftSchedule(64, 16, 1.0, 2) if config.context_shift else None
    Hs = 6 if kind.startswith("shared sets") else None
    problem = make_problem(
        T, config, Hkv=3, group=4, Hs=Hs, F=6, importance=kind in WEIGHTED, dtype=dtype, seed=seed,
        schedule=schedule,
    )  # fmt: skip
    alone = [problem.of_head(i, own) for i, own in enumerate(config.for_heads())]
    return problem, alone


def bind(problem: Problem, num_pages: int = 4) -> LayerState:
    """The layer with pages that are NaN."""
    Hs = len(problem.feature_map_k)
    layout = LayerLayout.from_config(
        problem.config, 3, Hs, problem.q.shape[-1], 6, problem.k.dtype,
        importance=problem.importance is not None,
    )  # fmt: skip
    pages = torch.full(
        (num_pages, layout.page_bytes), 0xFF, dtype=torch.uint8, device=problem.q.device
    )
    return LayerState.bind(problem.weights(), layout, pages)
