"""States of documents that were read apart, composed into the state of one sequence.

The documents stand one behind the other (`docs/algorithm.md`, section 8). In plain torch on states
in host memory: it runs once for a set of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lola_vllm.ops.constants import RECALL_EPS
from lola_vllm.ops.contract import LolaWeights
from lola_vllm.ops.int8 import Int8Rows, quantize
from lola_vllm.ops.portable import compute_dtype
from lola_vllm.ops.reference import feature_map, pair_importance
from lola_vllm.ops.rope_table import RopeTable
from lola_vllm.ops.shift_schedule import MAX_LENGTH, ShiftSchedule
from lola_vllm.state import BOUND_ROWS, SequenceLayout, StateLayout, StateViews


class ComposeError(ValueError):
    """States that cannot be composed; the message names what is wrong and the remedy."""


class Rows(NamedTuple):
    """Exact pairs of a document that its page's exact store holds.

    Attributes:
        source: `[m]`, their rows. positions: `[m]`, in the document. labels: `[m]`, in the
            composition.
    """

    source: Tensor
    positions: Tensor
    labels: Tensor

    def of(self, chosen: Tensor) -> Rows:
        """Those of a mask `[m]`."""
        return Rows(*(x[chosen] for x in self))


@dataclass(frozen=True)
class Composition:
    """Where the tokens of documents stand when they are one sequence.

    A document begins at a multiple of the update interval, as its window would not be one of the
    composition elsewhere. So the tokens of a document, but for the last one, count up to its last
    multiple of the interval. The pairs of the fewer than C tokens behind it take part all the same.

    Attributes:
        sink_size: of the model. schedule: of its context shifts; None: there are none.
        lengths: tokens of each document. offsets: position of its first token.
        evicted: pairs that have left its window.
        num_tokens, num_evicted: of the composition.
        kept, pooled: of each document, exact pairs that stay in the exact store, and that compete
            for the sparse caches.
    """

    sink_size: int
    schedule: ShiftSchedule | None
    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    evicted: tuple[int, ...]
    num_tokens: int
    num_evicted: int
    kept: tuple[Rows, ...]
    pooled: tuple[Rows, ...]

    @classmethod
    def of(
        cls,
        layout: StateLayout,
        lengths: Sequence[int],
        schedule: ShiftSchedule | None = None,
        longest: int = MAX_LENGTH,
    ) -> Composition:
        """The composition of documents of so many tokens, 1 or more each.

        Args:
            layout: of any page of the model. schedule: of context shifts; None: there are none.
            longest: tokens that a sequence can have.

        Raises:
            ComposeError: no document, one that is too short, or more tokens than `longest`.
        """
        C, sink = layout.update_interval, layout.sink_size
        if not lengths:
            raise ComposeError("no document to compose; give one or more that are not empty")
        shortest = max(C, sink)
        for index, n in enumerate(lengths[:-1]):
            if n // C * C < shortest:
                least = -(-shortest // C) * C
                raise ComposeError(
                    f"document {index + 1} has {n} tokens: those before the last one need at least "
                    f"{least}; read it with another one in one document, or put it last"
                )
        offsets = [0]
        for n in lengths[:-1]:
            offsets.append(offsets[-1] + n // C * C)
        total = offsets[-1] + lengths[-1]
        if total > longest:
            raise ComposeError(
                f"the documents have {total} tokens together, and a sequence has at most {longest} "
                "here; compose fewer"
            )
        start = int(layout.window_start(torch.tensor(total)))
        kept, pooled, evicted = [], [], []
        for index, (n, offset) in enumerate(zip(lengths, offsets, strict=True)):
            last = index == len(lengths) - 1
            window = int(layout.window_start(torch.tensor(n)))
            evicted.append(window - sink)
            held = torch.tensor([*range(min(sink, n)), *range(min(window, n), n)])
            labels = held + offset
            stays = (labels >= start) & ((held < n // C * C) | last)
            if index == 0:
                stays |= held < sink
            rows = Rows(layout.row(held), held, labels)
            kept.append(rows.of(stays))
            left = rows.of(~stays)
            pooled.append(left._replace(labels=left.labels.clamp(max=start - 1)))
        return cls(
            sink, schedule, tuple(lengths), tuple(offsets), tuple(evicted), total, start - sink,
            tuple(kept), tuple(pooled),
        )  # fmt: skip

    def moves(self, index: int, positions: Tensor, labels: Tensor) -> Tensor:
        """By how many RoPE positions exact keys of a document go on, int64: `[]` where all go on by
        the same number, else as `positions`.

        Args:
            index: of the document. positions: of the keys in it, any shape. labels: in the
                composition, of the same shape.
        """
        if self.schedule is None or self.num_tokens <= self.schedule.length:
            by = labels - positions
            offset = self.offsets[index]
            return torch.tensor(offset) if bool((by == offset).all()) else by
        there, here = (
            self.schedule.exact_rope_positions(x, n, self.sink_size)
            for x, n in ((labels, self.num_tokens), (positions, self.lengths[index]))
        )
        return there - here


class Composer:
    """Composes the states of one rank of a model.

    Args:
        sequence: the layout of a state. weights: of each of its layers. rope: the model's.
    """

    def __init__(
        self, sequence: SequenceLayout, weights: Sequence[LolaWeights], rope: RopeTable
    ) -> None:
        self.sequence = sequence
        self.rope = RopeTable(rope.cos.cpu(), rope.sin.cpu())
        rotation = weights[0].rotation
        self.schedule = None if rotation is None else rotation.schedule
        alike: dict[StateLayout, list[tuple[int, LolaWeights]]] = {}
        start = 0
        for own, layer in zip(weights, sequence.layers, strict=True):
            for i, page in enumerate(layer.pages):
                part = _on_host(own.of_group(i, len(layer.pages)))
                alike.setdefault(page, []).append((start, part))
                start += page.page_bytes
        self._groups = [PageGroup.of(layout, pages) for layout, pages in alike.items()]

    def composition(self, lengths: Sequence[int]) -> Composition:
        """Where documents of so many tokens stand.

        Raises:
            ComposeError: they cannot be composed.
        """
        longest = MAX_LENGTH if self.schedule is not None else len(self.rope.cos)
        return Composition.of(self._groups[0].layout, lengths, self.schedule, longest)

    @torch.no_grad()
    def compose(self, states: Sequence[Tensor], lengths: Sequence[int]) -> tuple[Tensor, int]:
        """The state of documents one behind the other.

        Args:
            states: `[>= row_bytes]` uint8 on the CPU. lengths: tokens of each; states of none are
                left out.

        Returns:
            The state `[row_bytes]` uint8, and its tokens. Bytes that are not valid after so many
            tokens are zero.

        Raises:
            ComposeError: they cannot be composed.
        """
        full = [(row, n) for row, n in zip(states, lengths, strict=True) if n]
        composition = self.composition([n for _, n in full])
        if len(full) == 1:
            return self.sequence.cleaned(full[0][0], composition.num_tokens), full[0][1]
        out = torch.zeros(self.sequence.row_bytes, dtype=torch.uint8)
        for group in self._groups:
            group.compose(composition, [row for row, _ in full], out, self.rope)
        return out, composition.num_tokens


def _on_host(weights: LolaWeights) -> LolaWeights:
    moved = {name: x.cpu() for name, x in vars(weights).items() if isinstance(x, Tensor)}
    return replace(weights, **moved)  # type: ignore[arg-type]  # all of them are tensors


class Pairs(NamedTuple):
    """Pairs of sparse sets, as pages keep them.

    Attributes:
        k, v: `[G, m, d]` of G sets. labels: `[G, m]`. w: `[G, m]`, weights of scores; `[G, 0]`
            where there are none.
    """

    k: Tensor | Int8Rows
    v: Tensor | Int8Rows
    labels: Tensor
    w: Tensor


Hidden = tuple[Tensor, Tensor]  # H `[heads, 2F, d]` and s `[heads, 2F]`


@dataclass(frozen=True, eq=False)
class PageGroup:
    """The pages of a state that have one layout, which are composed together.

    Attributes:
        starts: byte of a state at which each begins.
        key_maps: `[1 or 2, heads, d, F]` of the state heads of all pages (`LolaWeights.key_maps`).
        importance: `[KV heads of all pages, d // 2 + d + 1]`; as in `LolaWeights`.
        rotated_map_after: as in `LolaWeights`.
    """

    layout: StateLayout
    starts: tuple[int, ...]
    key_maps: Tensor
    importance: Tensor
    rotated_map_after: int

    @classmethod
    def of(cls, layout: StateLayout, pages: Sequence[tuple[int, LolaWeights]]) -> PageGroup:
        """Of pages with their starts and weights."""
        starts, weights = zip(*pages, strict=True)
        return cls(
            layout,
            starts,
            torch.cat([own.key_maps for own in weights], dim=1),
            torch.cat([own.importance for own in weights]),
            weights[0].rotated_map_after,
        )

    def compose(
        self, composition: Composition, states: Sequence[Tensor], out: Tensor, rope: RopeTable
    ) -> None:
        """Write the pages of a composition.

        Args:
            states: `[>= row_bytes]` uint8, of two documents or more. out: `[row_bytes]` uint8.
            rope: in the dtype of sums.
        """
        layout = self.layout
        views = [self._views(row) for row in states]
        pages = torch.zeros(len(self.starts), layout.page_bytes, dtype=torch.uint8)
        to = layout.views(pages)

        def put(part: Tensor, where: Any, values: Tensor) -> None:
            part[:, :, where] = values.unflatten(0, part.shape[:2]).to(part.dtype)

        dtype = compute_dtype(to.exact_k)
        for index, view in enumerate(views):
            rows = composition.kept[index]
            by = composition.moves(index, rows.positions, rows.labels)
            at = layout.row(rows.labels)
            put(to.exact_k, at, rope.move(view.exact_k[:, rows.source].to(dtype), by))
            put(to.exact_v, at, view.exact_v[:, rows.source])
        parts = []
        for index, view in enumerate(views):
            parts.append(self._cached(composition, index, view, rope))
            parts.append(self._evicted(composition, index, view, rope))
        pool = _joined(parts)
        room = min(composition.num_evicted, layout.sparse_cache_size)
        hidden = None
        if composition.num_evicted > room:
            both = zip(views, composition.evicted, strict=True)
            hidden = _sums(layout, views[0], [view for view, n in both if n > room])
        if hidden is not None or pool.labels.shape[1] > room:
            pool, hidden = self._choose(composition, pool, room, hidden)
        if hidden is not None:
            H, s = hidden
            if composition.schedule is not None:
                # The mass that a context shift leaves; models have met no sums of more pairs.
                most = 2.0 * composition.schedule.length
                scale = (most / s.sum(-1, keepdim=True)).clamp(max=1)
                H, s = H * scale.unsqueeze(-1), s * scale
            put(to.H, slice(None), H)
            put(to.s, slice(None), s)
        assert pool.labels.shape[1] == room, f"{pool.labels.shape[1]} pairs for {room} entries"
        entries = slice(room)
        for pairs, numbers, scales in (
            (pool.k, to.sparse_k, to.sparse_k_scale),
            (pool.v, to.sparse_v, to.sparse_v_scale),
        ):
            if isinstance(pairs, Int8Rows):
                put(numbers, entries, pairs.numbers)
                put(scales, entries, pairs.scale)
            else:
                put(numbers, entries, pairs)
        put(to.positions, entries, pool.labels)
        if layout.has_score_weights:
            put(to.score_weights, entries, pool.w)
        if layout.keeps_bounds:
            # Nothing is known of errors: every score is computed anew at the next update.
            to.bounds[:, :, BOUND_ROWS.index("low"), entries] = -torch.inf
        for start, page in zip(self.starts, pages, strict=True):
            out[start : start + layout.page_bytes] = page

    def _views(self, row: Tensor) -> StateViews:
        """Parts of a state's pages, with the heads of all pages in dim 0."""
        size = self.layout.page_bytes
        cuts = [row[start : start + size] for start in self.starts]
        pages = cuts[0][None] if len(cuts) == 1 else torch.stack(cuts)
        return StateViews(*(part.flatten(0, 1) for part in self.layout.views(pages)))

    def _cached(
        self, composition: Composition, index: int, view: StateViews, rope: RopeTable
    ) -> Pairs:
        """The pairs in a document's sparse caches, at their places in the composition."""
        m = min(composition.evicted[index], self.layout.sparse_cache_size)
        positions = view.positions[:, :m].long()
        labels = positions + composition.offsets[index]
        by = composition.moves(index, positions, labels)
        w = view.score_weights[:, :m]
        if not self.layout.int8_pairs:
            dtype = compute_dtype(view.sparse_k)
            moved = rope.move(view.sparse_k[:, :m].to(dtype), by).to(view.sparse_k.dtype)
            return Pairs(moved, view.sparse_v[:, :m], labels, w)
        k = Int8Rows(view.sparse_k[:, :m], view.sparse_k_scale[:, :m])
        v = Int8Rows(view.sparse_v[:, :m], view.sparse_v_scale[:, :m])
        if bool(by.any()):
            new = quantize(rope.move(k.to(compute_dtype(view.exact_k)), by))
            k = new if not by.dim() else _where(by != 0, new, k)
        return Pairs(k, v, labels, w)

    def _evicted(
        self, composition: Composition, index: int, view: StateViews, rope: RopeTable
    ) -> Pairs:
        """The pairs that leave a document's exact store, as they come into a sparse cache."""
        rows = composition.pooled[index]
        share = self.layout.num_sparse_heads // self.layout.num_kv_heads
        dtype = compute_dtype(view.exact_k)
        by = composition.moves(index, rows.positions, rows.labels)
        k = rope.move(view.exact_k[:, rows.source].to(dtype), by).to(view.exact_k.dtype)
        k = k.repeat_interleave(share, dim=0)
        v = view.exact_v[:, rows.source].repeat_interleave(share, dim=0)
        kept_k, kept_v = (quantize(x) if self.layout.int8_pairs else x for x in (k, v))
        w = view.score_weights[:, :0]
        if self.layout.has_score_weights:
            per_set = self.importance.to(dtype).repeat_interleave(share, dim=0)[:, None]
            w = pair_importance(kept_k.to(dtype), kept_v.to(dtype), per_set)
        return Pairs(kept_k, kept_v, rows.labels.expand(len(k), -1), w)

    def _choose(
        self, composition: Composition, pool: Pairs, room: int, hidden: Hidden | None
    ) -> tuple[Pairs, Hidden | None]:
        """The pairs of largest score, as many as there is room for, and the hidden state with the
        others folded in. Where nothing was folded, the others are lost.

        Scores are those of an update, but recent pairs are not preferred: they would all be the
        last document's.
        """
        layout = self.layout
        share = layout.num_state_heads // layout.num_sparse_heads
        dtype = torch.promote_types(layout.kv_dtype, torch.float32)
        v = pool.v.to(dtype)
        norms = v.norm(dim=-1)
        phi: Tensor | None = None
        if hidden is None:
            scores = norms if share == 1 else torch.ones_like(norms)
        else:
            rotated = composition.num_tokens > self.rotated_map_after
            maps = self.key_maps[-1 if rotated else 0].to(dtype)
            phi = feature_map(pool.k.to(dtype).repeat_interleave(share, dim=0), maps)
            H, s = hidden
            predicted = phi @ H
            predicted /= phi @ s.unsqueeze(-1) + RECALL_EPS
            errors = (v.repeat_interleave(share, dim=0) - predicted).norm(dim=-1)
            errors = errors.unflatten(0, (-1, share))
            scores = errors[:, 0]
            if share > 1:
                scores = (errors / norms.clamp(min=RECALL_EPS).unsqueeze(1)).mean(1)
        if pool.w.numel():
            scores = scores * pool.w.to(dtype)
        scores = scores.masked_fill(scores.isnan(), torch.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        kept = order[:, :room].sort(-1).values
        if hidden is not None and phi is not None:
            stays = torch.zeros_like(scores, dtype=torch.bool).scatter(1, kept, True).unsqueeze(-1)
            # It is cheaper to add zeros than to gather what is folded.
            phi = phi.masked_fill(stays.repeat_interleave(share, dim=0), 0)
            v = v.masked_fill(stays, 0).repeat_interleave(share, dim=0)
            hidden = H + phi.mT @ v, s + phi.sum(1)
        return _taken(pool, kept), hidden


def _sums(layout: StateLayout, like: StateViews, views: Sequence[StateViews]) -> Hidden:
    """H and s of pages in which something was folded, added up."""
    H = torch.zeros(like.H.shape, dtype=layout.state_dtype)
    s = torch.zeros(like.s.shape, dtype=layout.state_dtype)
    for view in views:
        H += view.H
        s += view.s
    return H, s


def _where(mask: Tensor, one: Int8Rows, other: Int8Rows) -> Int8Rows:
    return Int8Rows(
        torch.where(mask.unsqueeze(-1), one.numbers, other.numbers),
        torch.where(mask, one.scale, other.scale),
    )


def _joined(parts: Sequence[Pairs]) -> Pairs:
    """All pairs, by label."""

    def cat(rows: Sequence[Tensor | Int8Rows]) -> Tensor | Int8Rows:
        if isinstance(rows[0], Int8Rows):
            both = zip(*rows, strict=True)
            return Int8Rows(*(torch.cat(list(x), dim=1) for x in both))
        return torch.cat(rows, dim=1)  # type: ignore[arg-type]

    return Pairs(
        cat([part.k for part in parts]),
        cat([part.v for part in parts]),
        torch.cat([part.labels for part in parts], dim=1),
        torch.cat([part.w for part in parts], dim=1),
    )


def _taken(pool: Pairs, chosen: Tensor) -> Pairs:
    """The pairs at `chosen [G, m]`."""
    count = pool.labels.shape[1]
    flat = (chosen + count * torch.arange(len(chosen)).unsqueeze(-1)).flatten()

    def take(rows: Tensor) -> Tensor:
        if not rows.shape[1]:
            return rows
        return rows.flatten(0, 1).index_select(0, flat).unflatten(0, chosen.shape)

    def take_rows(rows: Tensor | Int8Rows) -> Tensor | Int8Rows:
        return Int8Rows(*map(take, rows)) if isinstance(rows, Int8Rows) else take(rows)

    return Pairs(take_rows(pool.k), take_rows(pool.v), take(pool.labels), take(pool.w))
