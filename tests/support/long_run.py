"""Sequences too long to read: a page jumps to the state of one, and some tokens more are fed."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import portable
from lola_vllm.core.ops.reference import feature_map
from lola_vllm.core.state import StateLayout, StateViews
from tests.support.problem import STATE_INDEX, Ops, Problem, decode, make_problem, prefill

WARM = 400  # tokens that make the state which is scaled up


@dataclass
class Arrived:
    """What a state gained over some tokens, against exact sums.

    Attributes:
        s: `[Hs]`, gain of sum(s) over twice the number of pairs folded, less 1.
        H: `[Hs]`, the part of H's exact gain that is in its gain, less 1.
        error: `[Hs]`, mean relative error of predictions that came in meanwhile.
        folded: pairs folded meanwhile.
    """

    s: Tensor
    H: Tensor
    error: Tensor
    folded: int

    def error_at(self, folded: float) -> float:
        """The error of a sequence that long: those of folds are independent, so of its root."""
        return float(self.error.max()) * (folded / self.folded) ** 0.5


def long_problem(interval: int, tokens: int, Hkv: int = 2) -> Problem:
    """A problem of WARM + tokens tokens whose values have a mean."""
    config = LolaConfig(window_size=8, sparse_cache_size=5, update_interval=interval)
    problem = make_problem(WARM + tokens, config, Hkv=Hkv, group=1, d=16, F=16, dtype=torch.float32)
    gen = torch.Generator().manual_seed(1)
    problem.v += torch.randn(Hkv, 16, generator=gen)
    return problem


def gain(
    ops: Ops, problem: Problem, folded: int, prompt: float = 0.5, first: Ops = portable
) -> Arrived:
    """Feeds all tokens, the page jumping to about `folded` folded pairs after WARM of them.

    Args:
        prompt: the part of those after WARM that is fed in one call; the others one by one.
        first: feeds the tokens before.
    """
    state, layout = problem.state(), problem.layout()
    prefill(first, problem, state, 0, WARM)
    views = layout.views(state.pages.cpu())
    before = folded_of(problem, layout, views, WARM, 0)
    # The ring and the grid of updates stay where they are.
    step = lcm(layout.ring_size, layout.update_interval)
    skipped = folded // step * step
    scale = int(layout.num_folded(torch.tensor(WARM + skipped))) / len(before[0])
    for part in (state.groups[0].views.H, state.groups[0].views.s):
        part[STATE_INDEX] = (part[STATE_INDEX].double() * scale).to(part.dtype)
    H, s = (
        part[STATE_INDEX].double().cpu()
        for part in (state.groups[0].views.H, state.groups[0].views.s)
    )
    T = len(problem.q)
    middle = WARM + int((T - WARM) * prompt)
    if middle > WARM:
        prefill(ops, problem, state, WARM, middle, skipped=skipped)
    for position in range(middle, T):
        decode(ops, problem, state, position, skipped=skipped)
    views = layout.views(state.pages.cpu())
    problem = problem.to(torch.device("cpu"))
    after = folded_of(problem, layout, views, T, skipped)

    result: dict[str, list[Tensor]] = {"s": [], "H": [], "error": []}
    for head, (old, new) in enumerate(zip(before, after, strict=True)):
        assert old < new
        k, v = (x[sorted(new - old), head].double() for x in (problem.k, problem.v))
        phi = feature_map(k, problem.feature_map_k[head].double())
        gained, exact = views.H[STATE_INDEX, head].double() - H[head], phi.T @ v
        result["s"].append((views.s[STATE_INDEX, head].double() - s[head]).sum() / (2 * len(k)) - 1)
        result["H"].append((gained * exact).sum() / (exact * exact).sum() - 1)
        p = (phi @ views.H[STATE_INDEX, head].double()) / (
            phi @ views.s[STATE_INDEX, head].double()
        )[:, None]
        q = (phi @ (H[head] + exact)) / (phi @ (s[head] + phi.sum(0)))[:, None]
        result["error"].append(((p - q).norm(dim=-1) / q.norm(dim=-1)).mean())
    parts = {name: torch.stack(values) for name, values in result.items()}
    return Arrived(**parts, folded=len(after[0]) - len(before[0]))


def folded_of(
    problem: Problem, layout: StateLayout, views: StateViews, n: int, skipped: int
) -> list[set[int]]:
    """The tokens folded into each head's state after n, `skipped` more having been claimed."""
    start = int(layout.window_start(torch.tensor(n + skipped))) - skipped
    everyone = []
    for positions in views.positions[STATE_INDEX].tolist():
        cached = {p - skipped if p >= WARM else p for p in positions}
        everyone.append(set(range(start)) - cached)
        assert len(everyone[-1]) == start - len(positions)
    return everyone
