"""Sequences too long to read: a page jumps to the state of one, and some tokens more are fed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

import torch
from problem import Problem, make_problem, poisoned_pool
from torch import Tensor

from lola_vllm.config import LolaConfig
from lola_vllm.ops.reference import feature_map
from lola_vllm.state import StateLayout, StateViews

WARM = 400  # tokens that make the state which is scaled up
SLOT = 1

# Feeds tokens start .. stop of a problem to page SLOT, `skipped` tokens further on in a sequence.
Feed = Callable[[Problem, StateLayout, StateViews, int, int, int], None]


@dataclass
class Arrived:
    """What a state gained over some tokens, against exact sums.

    Attributes:
        s: `[Hs]`, gain of sum(s) over twice the number of pairs folded, less 1.
        H: `[Hs]`, the part of H's exact gain that is in its gain, less 1.
        error: `[Hs]`, mean relative error of predictions that came in meanwhile.
        folded: pairs folded meanwhile.
        layout, views: the page is number SLOT.
    """

    s: Tensor
    H: Tensor
    error: Tensor
    folded: int
    layout: StateLayout
    views: StateViews

    def error_at(self, folded: float) -> float:
        """The error of a sequence that long: those of folds are independent, so of its root."""
        return float(self.error.max()) * (folded / self.folded) ** 0.5


def long_problem(interval: int, tokens: int, Hkv: int = 2, lam: int = 5) -> Problem:
    """A problem of WARM + tokens tokens whose values have a mean."""
    config = LolaConfig(
        window_size=8, sparse_cache_size=lam, update_interval=interval, feature_dim=16
    )
    problem = make_problem(WARM + tokens, config, Hkv=Hkv, group=1, d=16, dtype=torch.float32)
    gen = torch.Generator().manual_seed(1)
    problem.v += torch.randn(Hkv, 16, generator=gen)
    return problem


def gain(feed: Feed, problem: Problem, folded: int) -> Arrived:
    """Feeds all tokens, the page jumping to about `folded` folded pairs after WARM of them."""
    layout = problem.layout()
    _, views = poisoned_pool(layout, 2)
    feed(problem, layout, views, 0, WARM, 0)
    before = folded_of(problem, layout, views, WARM, 0)
    # The ring and the grid of updates stay where they are.
    step = lcm(layout.ring_size, layout.update_interval)
    skipped = folded // step * step
    scale = int(layout.num_folded(torch.tensor(WARM + skipped))) / len(before[0])
    for part in (views.H, views.s):
        part[SLOT] = (part[SLOT].double() * scale).to(part.dtype)
    H, s = views.H[SLOT].double(), views.s[SLOT].double()
    T = len(problem.q)
    feed(problem, layout, views, WARM, T, skipped)
    after = folded_of(problem, layout, views, T, skipped)

    result: dict[str, list[Tensor]] = {"s": [], "H": [], "error": []}
    for head, (old, new) in enumerate(zip(before, after, strict=True)):
        assert old < new
        k, v = (x[sorted(new - old), head].double() for x in (problem.k, problem.v))
        phi = feature_map(k, problem.feature_map_k[head].double())
        gained, exact = views.H[SLOT, head].double() - H[head], phi.T @ v
        result["s"].append((views.s[SLOT, head].double() - s[head]).sum() / (2 * len(k)) - 1)
        result["H"].append((gained * exact).sum() / (exact * exact).sum() - 1)
        p = (phi @ views.H[SLOT, head].double()) / (phi @ views.s[SLOT, head].double())[:, None]
        q = (phi @ (H[head] + exact)) / (phi @ (s[head] + phi.sum(0)))[:, None]
        result["error"].append(((p - q).norm(dim=-1) / q.norm(dim=-1)).mean())
    parts = {name: torch.stack(values) for name, values in result.items()}
    return Arrived(**parts, folded=len(after[0]) - len(before[0]), layout=layout, views=views)


def folded_of(
    problem: Problem, layout: StateLayout, views: StateViews, n: int, skipped: int
) -> list[set[int]]:
    """The tokens folded into each head's state after n, `skipped` more having been claimed."""
    start = int(layout.window_start(torch.tensor(n + skipped))) - skipped
    everyone = []
    for positions in views.positions[SLOT].tolist():
        cached = {p - skipped if p >= WARM else p for p in positions}
        everyone.append(set(range(start)) - cached)
        assert len(everyone[-1]) == start - len(positions)
    return everyone
