"""The context shift of pages, which keeps RoPE positions below the base's trained length.

In plain torch, or by the back end where it has an op for all layers in one launch, as those of GPUs
have. It runs once in D tokens of a sequence, and is lazy: a page is shifted just before its next
token. So a page is a pure function of the token prefix, and
one that is kept where a context shift is due is the same whether or not the sequence goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.core.ops.contract import HeadGroup, LayerState, PrefillBatch, PrefillOp, ShiftOp
from lola_vllm.core.ops.int8 import Int8Rows, quantize
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import StateViews


def shift_layers(
    layers: Sequence[LayerState],
    state_indices: Tensor,
    num_tokens: Tensor,
    shift: ShiftOp | None = None,
) -> None:
    """Shift the context of pages by D positions, in place (`docs/algorithm.md`, section 6).

    Exact keys outside the bucket of old keys are rotated towards it by D positions. H, s and the
    weights of sparse pairs' scores decay.

    Args:
        layers: of one model, or some of them; their contexts shift.
        state_indices: `[R]` integer on the pages' device; 0 or less is padding.
        num_tokens: `[R]` integer, tokens that each page holds; for all of them `ShiftSchedule.due`.
        shift: the back end's; None: in plain torch.
    """
    if shift is not None:
        own = [layer for layer in layers if not layer.layout.slides]
        if own:
            shift(own, state_indices, num_tokens.to(own[0].pages.device))
        layers = [layer for layer in layers if layer.layout.slides]
    for layer in layers:
        for group in layer.groups:
            _shift_group(group, state_indices, num_tokens)


def _shift_group(group: HeadGroup, state_indices: Tensor, num_tokens: Tensor) -> None:
    rotation, layout, views = group.weights.rotation, group.layout, group.views
    assert rotation is not None
    schedule, device = rotation.schedule, group.pages.device
    live = state_indices > 0
    state_indices = state_indices.long().clamp(min=0)  # padding writes the null page what it holds
    n = num_tokens.to(device, torch.int64)[:, None]
    row = torch.arange(layout.sink_size + layout.ring_size, device=device)
    ring = n - 1 - (n - 1 - (row - layout.sink_size)) % layout.ring_size
    exact = schedule.rotation_steps(ring, n) * (
        live[:, None] & (row >= layout.sink_size)
    )  # [R, rows]
    _rotate(rotation, views.exact_k, state_indices, exact[:, None])
    entry = torch.arange(layout.sparse_cache_size, device=device)
    sparse = schedule.rotation_steps(views.positions[state_indices].long(), n[..., None])
    sparse *= (entry < layout.num_sparse(n))[:, None] & live[:, None, None]
    if layout.int8_pairs:
        _rotate_int8(rotation, views, state_indices, sparse)
    else:
        _rotate(rotation, views.sparse_k, state_indices, sparse)
    for total in (views.H, views.s):
        rows = total[state_indices]
        decays = live.view(-1, *[1] * (rows.dim() - 1))
        total[state_indices] = torch.where(decays, rows * schedule.decay, rows)
    if schedule.score_decay and layout.has_score_weights:
        w = views.score_weights[state_indices]
        factors = schedule.score_decay_factors(
            views.positions[state_indices].long(), n[..., None]
        ).to(w.dtype)
        views.score_weights[state_indices] = torch.where(live[:, None, None], w * factors, w)


def _rotate(rotation: KeyRotation, keys: Tensor, state_indices: Tensor, steps: Tensor) -> None:
    """Rotate keys `[N, heads, rows, d]` of the pages by `steps [R, heads or 1, rows]`."""
    old = keys[state_indices]
    keys[state_indices] = rotation.rotate_by(old.to(rotation.cos.dtype), steps).to(old.dtype)


def _rotate_int8(
    rotation: KeyRotation, views: StateViews, state_indices: Tensor, steps: Tensor
) -> None:
    """The same of the sparse keys where they are int8: each is rounded again after its rotation."""
    old = Int8Rows(views.sparse_k[state_indices], views.sparse_k_scale[state_indices])
    new = quantize(rotation.rotate_by(old.to(rotation.cos.dtype), steps))
    moves = steps != 0
    views.sparse_k[state_indices] = torch.where(moves[..., None], new.numbers, old.numbers)
    views.sparse_k_scale[state_indices] = torch.where(moves, new.scale, old.scale)


class DueRows(NamedTuple):
    """Rows whose pages are shifted before their next token.

    Attributes:
        state_indices: `[R]` integer on the pages' device. num_tokens: `[R]` int64, tokens in
            each page, on the same device.
    """

    state_indices: Tensor
    num_tokens: Tensor

    @classmethod
    def of(
        cls, schedule: ShiftSchedule, state_indices: Tensor, num_tokens: Tensor
    ) -> DueRows | None:
        """The rows that are due; None where none is.

        Args:
            state_indices: `[R]` integer on the pages' device. num_tokens: `[R]` integer in host
                memory.
        """
        rows = schedule.due(num_tokens).nonzero().squeeze(1)
        if not len(rows):
            return None
        return cls(
            state_indices[rows.to(state_indices.device)],
            num_tokens[rows].to(state_indices.device, torch.int64),
        )


def shift_due(
    layers: Sequence[LayerState],
    state_indices: Tensor,
    num_tokens: Tensor,
    shift: ShiftOp | None = None,
) -> None:
    """Shift the pages whose next token needs it: what comes before a decode.

    Args:
        layers: of one model. state_indices: `[R]` integer on the pages' device.
        num_tokens: `[R]` integer in host memory, without the new tokens.
        shift: as in `shift_layers`.
    """
    schedule = layers[0].schedule
    due = None if schedule is None else DueRows.of(schedule, state_indices, num_tokens)
    if due is not None:
        shift_layers(layers, *due, shift)


class Segment(NamedTuple):
    """A part of a prefill that nothing divides.

    Attributes:
        due: what is shifted before it.
        batch: its rows.
        spans: where its tokens are in the call, row by row; None: all of them.
    """

    due: DueRows | None
    batch: PrefillBatch
    spans: list[slice] | None


def split_prefill(
    schedule: ShiftSchedule | None,
    batch: PrefillBatch,
    stops: Mapping[int, Sequence[int]] | None = None,
) -> list[Segment]:
    """A prefill as its context shifts divide it, the same for all layers.

    In order; one segment where no context shift comes.

    Rows without new tokens are shifted with their next one.

    Args:
        stops: by row, token counts of its page at which a segment ends too.
    """
    if schedule is None and not stops:
        return [Segment(None, batch, None)]
    lengths_of = [
        [b - a for a, b in pairwise(row)] for row in segment_bounds(schedule, batch, stops or {})
    ]
    segments = []
    for number in range(max(map(len, lengths_of), default=0)):
        rows = [row for row, lengths in enumerate(lengths_of) if number < len(lengths)]
        skipped = torch.tensor([sum(lengths_of[row][:number]) for row in rows])
        lengths = torch.tensor([lengths_of[row][number] for row in rows])
        seen = batch.context_lens[rows] + skipped
        first = (batch.query_start_loc[rows] + skipped).tolist()
        spans = [slice(a, a + n) for a, n in zip(first, lengths.tolist(), strict=True)]
        state_indices = batch.state_indices
        if len(rows) < len(lengths_of):
            state_indices = state_indices[torch.tensor(rows, device=state_indices.device)]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        segment = PrefillBatch(
            state_indices,
            offsets.to(batch.query_start_loc.dtype),
            seen.to(batch.context_lens.dtype),
        )
        due = None if schedule is None else DueRows.of(schedule, state_indices, seen)
        segments.append(Segment(due, segment, spans))
    if len(segments) < 2:  # as it came, so that nothing is copied
        return [Segment(segments[0].due if segments else None, batch, None)]
    return segments


def segment_bounds(
    schedule: ShiftSchedule | None, batch: PrefillBatch, stops: Mapping[int, Sequence[int]]
) -> list[list[int]]:
    """The token counts of the page of each row of a prefill, before its first segment and after
    each; arguments as for `split_prefill`."""
    contexts, starts = batch.context_lens.tolist(), batch.query_start_loc.tolist()
    bounds = []
    for row, (context, (start, stop)) in enumerate(zip(contexts, pairwise(starts), strict=False)):
        count = stop - start
        whole = [count] if count else []
        lengths = whole if schedule is None else schedule.segment_lengths(context, count)
        inside = {n for n in stops.get(row, ()) if context < n < context + count}
        bounds.append(sorted({*accumulate(lengths, initial=context), *inside}))
    return bounds


def prefill(
    op: PrefillOp,
    layer: LayerState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Sequence[Segment],
    out: Tensor,
    after: Callable[[int], None] | None = None,
    shift: ShiftOp | None = None,
) -> None:
    """A back end's prefill, and the context shifts between its segments; see
    `contract.PrefillOp`.

    Args:
        after: is told the number of each segment when it is done. shift: as in `shift_layers`.
    """
    for number, (due, batch, spans) in enumerate(segments):
        if due is not None:
            shift_layers([layer], *due, shift)
        if spans is None:
            op(layer, q, k, v, batch, out)
        else:
            answers = _take(out, spans)
            op(layer, _take(q, spans), _take(k, spans), _take(v, spans), batch, answers)
            if len(spans) > 1:
                lengths = [span.stop - span.start for span in spans]
                for span, part in zip(spans, answers.split(lengths), strict=True):
                    out[span] = part
        if after is not None:
            after(number)


def _take(x: Tensor, spans: Sequence[slice]) -> Tensor:
    """The tokens of x `[T, ...]` that lie in the spans; of one span a view."""
    parts = [x[span] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
