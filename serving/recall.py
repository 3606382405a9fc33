"""The contents of a page's sparse cache and their recall errors, from its bytes, on any device.

Scores come from the portable `sre_scores`. The ops select by the same numbers, times the
pairs' importance where the model has one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.ops import LolaWeights, portable
from lola_vllm.ops.constants import RECALL_EPS
from lola_vllm.ops.context_shift import shift_pages
from lola_vllm.ops.contract import LayerState
from lola_vllm.ops.int8 import rounded
from lola_vllm.ops.key_rotation import KeyRotation
from lola_vllm.ops.reference import pair_importance
from lola_vllm.serving.keys import Pairs
from lola_vllm.state import StateLayout, StateViews

# Pairs scored at once: bounds the memory that their features take.
MAX_SCORED = 1024


class Remembered(NamedTuple):
    """The sparse cache of one page, by position.

    Attributes:
        positions: `[Hg, S]` int, ascending. errors: `[Hg, S]`, the self-recall errors against the
            page's hidden state (section 3 of `docs/algorithm.md`), relative to the value's norm
            where state heads share a sparse set.
        score_weights: `[Hg, S]`, what multiplies the errors in the choice; None where nothing does.
    """

    positions: Tensor
    errors: Tensor
    score_weights: Tensor | None


class Forecast(NamedTuple):
    """The effect of the next update on a page, averaged over its sparse sets.

    It can be computed before the update. An update scores against the hidden state before it, and
    the page already holds the pairs that will leave the window.

    Attributes:
        swapped: share of the sparse cache that incoming pairs will replace, 0 to 1.
        kept_error, folded_error: mean SRE / ||v|| of the pairs that will be in the sparse cache and
            of those that will be folded into the hidden state; None where there are none.
    """

    swapped: float
    kept_error: float | None
    folded_error: float | None


def remembered(page: Tensor, layout: StateLayout, weights: LolaWeights, n: int) -> Remembered:
    """The sparse cache of a page that has seen n tokens.

    Args:
        page: `[>= page_bytes]`, raw bytes. weights: the layer's.
    """
    views = layout.views(page[None])
    size = int(layout.num_sparse(torch.tensor(n)))
    positions = views.positions[0, :, :size].long()
    errors = _errors(*_cached(layout, views, size), layout, weights, views, n)
    order = positions.argsort(dim=-1)
    score_weights = (
        views.score_weights[0, :, :size].gather(-1, order) if layout.has_score_weights else None
    )
    return Remembered(positions.gather(-1, order), errors.gather(-1, order), score_weights)


def recalled(
    page: Tensor, layout: StateLayout, weights: LolaWeights, n: int, pairs: Pairs
) -> Tensor:
    """Recall errors of all tokens that left the window: `[Hg, E]`, of positions from sinks to the
    window. Those of the sparse cache are as in `remembered`.

    Args:
        page, layout, weights: as for `remembered`, of a page that was never shifted.
        pairs: all that the layer saw.
    """
    views = layout.views(page[None])
    errors = [page.new_empty(layout.num_sparse_heads, 0, dtype=torch.float32)]
    stop = int(layout.window_start(torch.tensor(n)))
    for start in range(layout.sink_size, stop, MAX_SCORED):
        rows = slice(start, min(start + MAX_SCORED, stop))
        share = layout.num_sparse_heads // layout.num_kv_heads
        k, v = (
            x[rows].to(page.device).transpose(0, 1).repeat_interleave(share, dim=0)[None]
            for x in pairs
        )
        if layout.int8_pairs:
            k, v = (rounded(x.to(portable.compute_dtype(x))) for x in (k, v))
        errors.append(_errors(k, v, layout, weights, views, n))
    return torch.cat(errors, dim=1)


def forecast(
    page: Tensor,
    layout: StateLayout,
    weights: LolaWeights,
    n: int,
    rotation: KeyRotation | None = None,
) -> Forecast:
    """The effect of the first update after n tokens; arguments as for `remembered`.

    Args:
        rotation: of the layer's context shifts, one of which may come before the update.
    """
    lam, C = layout.sparse_cache_size, layout.update_interval
    due = torch.tensor((n // C + 1) * C)
    if rotation is not None:
        page = _shifted(page, layout, weights, range(n, int(due)), rotation)
    views = layout.views(page[None])
    # With an interval above the window, the page lacks some of the pairs that will leave.
    start = int(layout.window_start(torch.tensor(n)))
    stop = min(int(layout.window_start(due)), n)
    rows = layout.row(torch.arange(start, max(start, stop), device=page.device))
    size = int(layout.num_sparse(torch.tensor(n)))
    share = layout.num_sparse_heads // layout.num_kv_heads

    def candidates(cached: Tensor, exact: Tensor) -> Tensor:
        incoming = exact[:, :, rows].repeat_interleave(share, dim=1).to(cached.dtype)
        if layout.int8_pairs:
            incoming = rounded(incoming)
        return torch.cat([cached, incoming], dim=2)

    cached_k, cached_v = _cached(layout, views, size)
    k, v = candidates(cached_k, views.exact_k), candidates(cached_v, views.exact_v)
    errors = scores = _errors(k, v, layout, weights, views, n)  # [Hg, E]
    if weights.importance is not None:
        per_set = weights.importance.repeat_interleave(share, dim=0)[:, None]
        new = pair_importance(k[0, :, size:], v[0, :, size:], per_set)
        scores = errors * torch.cat([views.score_weights[0, :, :size], new], dim=1)
    num_kept = min(lam, scores.shape[-1])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(-1, scores.topk(num_kept, dim=-1).indices, True)
    free = lam - size
    entering = kept[:, size:].sum(-1).float()
    relative = errors
    if layout.num_state_heads == layout.num_sparse_heads:  # else they are relative already
        relative = errors / v[0].norm(dim=-1).clamp(min=RECALL_EPS)
    return Forecast(
        swapped=float((entering - free).clamp(min=0).mean()) / lam if lam else 0.0,
        kept_error=_mean(relative[kept]),
        folded_error=_mean(relative[~kept]),
    )


def _cached(layout: StateLayout, views: StateViews, size: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, Hg, size, d]` of the first `size` sparse entries of the only page."""
    first = torch.zeros(1, dtype=torch.long, device=views.H.device)
    dtype = portable.compute_dtype(views.exact_k)
    return portable.sparse_pairs(layout, views, first, size, dtype)


def _shifted(
    page: Tensor, layout: StateLayout, weights: LolaWeights, counts: range, rotation: KeyRotation
) -> Tensor:
    """A page as its context shifts while it has so many tokens leave it; a copy where there is
    one."""
    due = [n for n in counts if rotation.schedule.due(n)]
    if not due:
        return page
    pages = torch.stack([torch.zeros_like(page), page])  # the first one is padding
    state = LayerState.bind(weights, layout, pages, rotation)
    for n in due:
        shift_pages(state, torch.tensor([1], device=page.device), torch.tensor([n]))
    return pages[1]


def _errors(
    k: Tensor, v: Tensor, layout: StateLayout, weights: LolaWeights, views: StateViews, n: int
) -> Tensor:
    """Recall errors `[Hg, E]` of candidates k, v `[1, Hg, E, d]` of the only page in `views`."""
    first = torch.zeros(1, dtype=torch.long, device=k.device)
    empty = (layout.num_folded(torch.tensor([n])) == 0).to(k.device)
    return portable.sre_scores(k, v, weights.feature_map_k, views.H, views.s, first, empty)[0]


def _mean(x: Tensor) -> float | None:
    return float(x.mean()) if x.numel() else None
