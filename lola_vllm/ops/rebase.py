"""The rebase of pages: their origin moves, so that places stay below the base's trained length.

One function for all back ends, in plain torch: it runs once in D tokens of a sequence. It is lazy:
a page is rebased just before its next token. So a page is a pure function of the token prefix, and
one that is kept at a rebase point is the same whether or not the sequence goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.ops.by_head import states_of
from lola_vllm.ops.contract import LayerPrefill, LayerState, PrefillBatch, State
from lola_vllm.ops.int8 import Int8Rows, quantize
from lola_vllm.ops.places import Places
from lola_vllm.state import BOUND_ROWS


def rebase(state: State, slots: Tensor, num_tokens: Tensor) -> None:
    """Move the origin of pages by D, in place (`docs/algorithm.md`, section 6).

    Exact keys outside the far zone turn towards it by D positions. H, s and the weights of sparse
    pairs' scores fade. Bounds on recall errors are forgotten.

    Args:
        state: of a layer whose `turn` is not None.
        slots: `[R]` integer on the pages' device; slots of 0 or less are padding.
        num_tokens: `[R]` integer, tokens that each page holds; for all of them `Places.due`.
    """
    for page in states_of(state):
        _rebase_page(page, slots, num_tokens)


def _rebase_page(state: LayerState, slots: Tensor, num_tokens: Tensor) -> None:
    turn, layout, views = state.turn, state.layout, state.views
    assert turn is not None
    places, device = turn.places, state.pages.device
    live = slots > 0
    slots = slots.long().clamp(min=0)  # padding writes the null page what it holds
    n = num_tokens.to(device, torch.int64)[:, None]
    row = torch.arange(layout.sink_size + layout.ring_size, device=device)
    ring = n - 1 - (n - 1 - (row - layout.sink_size)) % layout.ring_size
    exact = places.steps(ring, n) * (live[:, None] & (row >= layout.sink_size))  # [R, rows]
    _turn(state, views.exact_k, slots, exact[:, None])
    slot = torch.arange(layout.sparse_cache_size, device=device)
    sparse = places.steps(views.positions[slots].long(), n[..., None])
    sparse *= (slot < layout.num_sparse(n))[:, None] & live[:, None, None]
    if layout.int8_pairs:
        _turn_int8(state, slots, sparse)
    else:
        _turn(state, views.sparse_k, slots, sparse)
    for total in (views.H, views.s):
        rows = total[slots]
        fades = live.view(-1, *[1] * (rows.dim() - 1))
        total[slots] = torch.where(fades, rows * places.decay, rows)
    if places.score_fade and layout.has_saliency:
        w = views.saliency[slots]
        factors = places.score_factors(views.positions[slots].long(), n[..., None]).to(w.dtype)
        views.saliency[slots] = torch.where(live[:, None, None], w * factors, w)
    if views.bounds.numel():
        # Lemma 1 needs sums that only grow. Every score is computed anew at the next update.
        low = views.bounds[slots, :, BOUND_ROWS.index("low")]
        views.bounds[slots, :, BOUND_ROWS.index("low")] = torch.where(
            live[:, None, None], -torch.inf, low
        )


def _turn(state: LayerState, keys: Tensor, slots: Tensor, steps: Tensor) -> None:
    """Turn keys `[N, heads, rows, d]` of the pages by `steps [R, heads or 1, rows]`."""
    assert state.turn is not None
    old = keys[slots]
    keys[slots] = state.turn.by(old.to(state.turn.cos.dtype), steps).to(old.dtype)


def _turn_int8(state: LayerState, slots: Tensor, steps: Tensor) -> None:
    """The same of the sparse keys where they are int8: each is rounded again after its turn."""
    assert state.turn is not None
    views = state.views
    old = Int8Rows(views.sparse_k[slots], views.sparse_k_scale[slots])
    new = quantize(state.turn.by(old.to(state.turn.cos.dtype), steps))
    moves = steps != 0
    views.sparse_k[slots] = torch.where(moves[..., None], new.numbers, old.numbers)
    views.sparse_k_scale[slots] = torch.where(moves, new.scale, old.scale)


class Due(NamedTuple):
    """Pages that are rebased before their next token.

    Attributes:
        slots: `[R]` integer on the pages' device. num_tokens: `[R]` int64, tokens in each page, on
            the same device.
    """

    slots: Tensor
    num_tokens: Tensor

    @classmethod
    def of(cls, places: Places, slots: Tensor, num_tokens: Tensor) -> Due | None:
        """Those of the pages that are due; None where none is.

        Args:
            slots: `[R]` integer on the pages' device. num_tokens: `[R]` integer in host memory.
        """
        rows = places.due(num_tokens).nonzero().squeeze(1)
        if not len(rows):
            return None
        return cls(slots[rows.to(slots.device)], num_tokens[rows].to(slots.device, torch.int64))


class Piece(NamedTuple):
    """A part of a prefill that no rebase divides.

    Attributes:
        due: what is rebased before it.
        batch: its rows.
        spans: where its tokens are in the call, row by row; None: all of them.
    """

    due: Due | None
    batch: PrefillBatch
    spans: list[slice] | None


def cut(places: Places | None, batch: PrefillBatch) -> list[Piece]:
    """A prefill as its rebases divide it, the same for all layers. In order; one where none does.

    Rows without new tokens are rebased with their next one.
    """
    if places is None:
        return [Piece(None, batch, None)]
    contexts, starts = batch.context_lens.tolist(), batch.query_start_loc.tolist()
    cuts = [
        places.segments(context, stop - start)
        for context, start, stop in zip(contexts, starts, starts[1:], strict=False)
    ]
    pieces = []
    for number in range(max(map(len, cuts), default=0)):
        rows = [row for row, lengths in enumerate(cuts) if number < len(lengths)]
        skipped = torch.tensor([sum(cuts[row][:number]) for row in rows])
        lengths = torch.tensor([cuts[row][number] for row in rows])
        seen = batch.context_lens[rows] + skipped
        first = (batch.query_start_loc[rows] + skipped).tolist()
        spans = [slice(a, a + n) for a, n in zip(first, lengths.tolist(), strict=True)]
        slots = batch.slots
        if len(rows) < len(cuts):
            slots = slots[torch.tensor(rows, device=slots.device)]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        piece = PrefillBatch(
            slots, offsets.to(batch.query_start_loc.dtype), seen.to(batch.context_lens.dtype)
        )
        pieces.append(Piece(Due.of(places, slots, seen), piece, spans))
    if len(pieces) < 2:  # as it came, so that nothing is copied
        return [Piece(pieces[0].due if pieces else None, batch, None)]
    return pieces


def prefill(
    op: LayerPrefill,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Sequence[Piece],
    out: Tensor,
) -> None:
    """A back end's prefill, and the rebases between its pieces; see `contract.PrefillOp`."""
    for due, batch, spans in pieces:
        if due is not None:
            rebase(state, *due)
        if spans is None:
            op(state, q, k, v, batch, out)
            continue
        answers = _take(out, spans)
        op(state, _take(q, spans), _take(k, spans), _take(v, spans), batch, answers)
        if len(spans) > 1:
            lengths = [span.stop - span.start for span in spans]
            for span, part in zip(spans, answers.split(lengths), strict=True):
                out[span] = part


def _take(x: Tensor, spans: Sequence[slice]) -> Tensor:
    """The tokens of x `[T, ...]` that lie in the spans; of one span a view."""
    parts = [x[span] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
