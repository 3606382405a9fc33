"""The contents of a page's sparse cache and their recall errors, from its bytes, on any device.

Errors come from `portable.recall_errors`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.core.ops import portable
from lola_vllm.core.ops.contract import HeadGroup
from lola_vllm.core.ops.int8 import rounded
from lola_vllm.core.state import StateLayout, StateViews
from lola_vllm.serving.keys import PromptPairs

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


def recalled(group: HeadGroup, page: Tensor, n: int, pairs: PromptPairs) -> Tensor:
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


def _cached(layout: StateLayout, views: StateViews, size: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, Hg, size, d]` of the first `size` sparse entries of the only page."""
    first = torch.zeros(1, dtype=torch.long, device=views.H.device)
    dtype = portable.compute_dtype(views.exact_k)
    return portable.sparse_pairs(layout, views, first, size, dtype)


def _errors(group: HeadGroup, views: StateViews, n: int, due: int, k: Tensor, v: Tensor) -> Tensor:
    """Recall errors `[Hg, E]` of candidates k, v `[1, Hg, E, d]`, as an update scores them.

    Args:
        views: of a page alone, after n tokens. due: tokens at the update, n or more.
    """
    first = torch.zeros(1, dtype=torch.long, device=k.device)
    empty = (group.layout.num_folded(torch.tensor([n])) == 0).to(k.device)
    maps = group.weights.maps_of(torch.tensor([due], device=k.device))
    return portable.recall_errors(k, v, maps, views.H, views.s, first, empty)[0]
