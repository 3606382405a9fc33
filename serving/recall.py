"""The contents of a page's sparse cache and their recall errors, from its bytes, on any device.

Errors come from `portable.recall_errors`. What an update does with them is left to the layer's op.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.ops import portable
from lola_vllm.ops.constants import RECALL_EPS
from lola_vllm.ops.context_shift import shift_due
from lola_vllm.ops.contract import Backend, HeadGroup, LayerState, PrefillBatch
from lola_vllm.ops.int8 import rounded
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
    the page already holds the pairs that will leave the window. All is None where the update
    interval is above the window, as the page then lacks some of these.

    Attributes:
        swapped: share of the sparse cache that incoming pairs will replace, 0 to 1.
        kept_error, folded_error: mean SRE / ||v|| of the pairs that will be in the sparse cache and
            of those that will be folded into the hidden state; None where there are none.
    """

    swapped: float | None
    kept_error: float | None
    folded_error: float | None


def remembered(group: HeadGroup, page: Tensor, n: int) -> Remembered:
    """The sparse cache of a page that has seen n tokens.

    Args:
        group: whose pages are not touched. page: `[>= page_bytes]`, raw bytes of such a page.
    """
    layout = group.layout
    views = layout.views(page[None])
    size = int(layout.num_sparse(torch.tensor(n)))
    positions = views.positions[0, :, :size].long()
    errors = _errors(group, views, n, n, *_cached(layout, views, size))
    order = positions.argsort(dim=-1)
    score_weights = (
        views.score_weights[0, :, :size].gather(-1, order) if layout.has_score_weights else None
    )
    return Remembered(positions.gather(-1, order), errors.gather(-1, order), score_weights)


def recalled(group: HeadGroup, page: Tensor, n: int, pairs: Pairs) -> Tensor:
    """Recall errors of all tokens that left the window: `[Hg, E]`, of positions from sinks to the
    window. Those of the sparse cache are as in `remembered`.

    Args:
        group, page: as for `remembered`, of a page that was never shifted.
        pairs: all that the group saw.
    """
    layout = group.layout
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
        errors.append(_errors(group, views, n, n, k, v))
    return torch.cat(errors, dim=1)


def forecast(ops: Backend, group: HeadGroup, page: Tensor, n: int) -> Forecast:
    """The effect of the first update after n tokens.

    The layer's own op makes the update, on a copy of the page.

    Args:
        ops: the layer's. group, page: as for `remembered`; the page is not changed.
    """
    layout = group.layout
    lam, C = layout.sparse_cache_size, layout.update_interval
    if layout.window_size < C:
        return Forecast(None, None, None)
    due = (n // C + 1) * C
    page = _shifted(group, page, range(n, due))  # a context shift may come before the update
    views = layout.views(page[None])
    start, stop = (int(layout.window_start(torch.tensor(m))) for m in (n, due))
    leaving = torch.arange(start, max(start, min(stop, n)), device=page.device)
    rows = layout.row(leaving)
    size = int(layout.num_sparse(torch.tensor(n)))
    share = layout.num_sparse_heads // layout.num_kv_heads

    def candidates(cached: Tensor, exact: Tensor) -> Tensor:
        incoming = exact[:, :, rows].repeat_interleave(share, dim=1).to(cached.dtype)
        if layout.int8_pairs:
            incoming = rounded(incoming)
        return torch.cat([cached, incoming], dim=2)

    cached_k, cached_v = _cached(layout, views, size)
    k, v = candidates(cached_k, views.exact_k), candidates(cached_v, views.exact_v)
    errors = _errors(group, views, n, due, k, v)  # [Hg, E]
    if layout.num_state_heads == layout.num_sparse_heads:  # else they are relative already
        errors = errors / v[0].norm(dim=-1).clamp(min=RECALL_EPS)
    positions = views.positions[0, :, :size].long()
    positions = torch.cat([positions, leaving.expand(len(positions), -1)], dim=1)
    kept = (positions[:, :, None] == _updated(ops, group, page, due)[:, None]).any(-1)
    entering = kept[:, size:].sum(-1).float()
    return Forecast(
        swapped=float((entering - (lam - size)).clamp(min=0).mean()) / lam if lam else 0.0,
        kept_error=_mean(errors[kept]),
        folded_error=_mean(errors[~kept]),
    )


def _updated(ops: Backend, group: HeadGroup, page: Tensor, due: int) -> Tensor:
    """Positions `[Hg, S]` in the sparse sets of a page after its update at `due` tokens.

    The tokens until then are left out, and a token of zeros completes the interval: they do not
    leave the window in this update.
    """
    layout, own = group.layout, _with_copy(group, page)
    q, k = (
        group.views.exact_k.new_zeros(1, heads, layout.head_dim)
        for heads in (group.weights.num_heads, layout.num_kv_heads)
    )
    index, ends = torch.ones(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    batch = PrefillBatch(index.to(page.device), ends, torch.tensor([due - 1], dtype=torch.int32))
    ops.prefill(own, q, k, k, batch, torch.empty_like(q))
    size = int(layout.num_sparse(torch.tensor(due)))
    return own.groups[0].views.positions[1, :, :size].long()


def _cached(layout: StateLayout, views: StateViews, size: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, Hg, size, d]` of the first `size` sparse entries of the only page."""
    first = torch.zeros(1, dtype=torch.long, device=views.H.device)
    dtype = portable.compute_dtype(views.exact_k)
    return portable.sparse_pairs(layout, views, first, size, dtype)


def _with_copy(group: HeadGroup, page: Tensor) -> LayerState:
    """These heads with pages of their own: padding, and a copy of a page at state index 1."""
    return group.alone(torch.stack([torch.zeros_like(page), page]))


def _shifted(group: HeadGroup, page: Tensor, counts: range) -> Tensor:
    """A page as its context shifts while it has so many tokens leave it; a copy where it shifts."""
    rotation = group.weights.rotation
    if rotation is None or not any(map(rotation.schedule.due, counts)):
        return page
    own, index = _with_copy(group, page), torch.ones(1, dtype=torch.int32, device=page.device)
    for n in counts:
        shift_due([own], index, torch.tensor([n]))
    return own.pages[1]


def _errors(group: HeadGroup, views: StateViews, n: int, due: int, k: Tensor, v: Tensor) -> Tensor:
    """Recall errors `[Hg, E]` of candidates k, v `[1, Hg, E, d]`, as an update scores them.

    Args:
        views: of a page alone, after n tokens. due: tokens at the update, n or more.
    """
    first = torch.zeros(1, dtype=torch.long, device=k.device)
    empty = (group.layout.num_folded(torch.tensor([n])) == 0).to(k.device)
    maps = group.weights.maps_of(torch.tensor([due], device=k.device))
    return portable.recall_errors(k, v, maps, views.H, views.s, first, empty)[0]


def _mean(x: Tensor) -> float | None:
    return float(x.mean()) if x.numel() else None
