"""States of documents that were read apart, composed into the state of one sequence.

The documents stand one behind the other (`composition.py`, and `docs/algorithm.md`, section 8). In
plain torch on states in host memory: it runs once for a set of documents.

Sparse sets differ in size. A few hold thousands of pairs and many hold a few, so pairs lie one
behind the other in flat tensors: what is done to each pair alone is done to those of several small
sets at once, and products of matrices set by set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.ops.composition import ComposeError, Composition, Rows
from lola_vllm.core.ops.constants import FEATURE_FLOOR, RECALL_EPS
from lola_vllm.core.ops.contract import LolaWeights
from lola_vllm.core.ops.int8 import Int8Rows, quantize
from lola_vllm.core.ops.reference import pair_importance
from lola_vllm.core.ops.rope_table import RopeTable
from lola_vllm.core.ops.shift_schedule import MAX_LENGTH
from lola_vllm.core.ops.state_parts import Bytes, StateParts

__all__ = ["ComposeError", "Composer", "Composition"]

# Pairs of small sets that are looked at together: as many as a processor's cache holds.
RUN_PAIRS = 4096


class Pairs(NamedTuple):
    """Pairs of sparse sets, as pages keep them, of one set after the other.

    Attributes:
        k, v: `[m, d]`. labels: `[m]`. w: `[m]`, weights of scores; `[0]` where there are none.
    """

    k: Tensor | Int8Rows
    v: Tensor | Int8Rows
    labels: Tensor
    w: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        """With the same change to all tensors."""
        k, v = (
            Int8Rows(*map(change, x)) if isinstance(x, Int8Rows) else change(x)
            for x in (self.k, self.v)
        )
        return Pairs(k, v, change(self.labels), change(self.w))

    def of(self, chosen: Tensor) -> Pairs:
        """The entries at indices `[n]`."""
        return self.each(lambda rows: rows.index_select(0, chosen) if len(rows) else rows)


class SetBatch(NamedTuple):
    """Sparse sets that are composed together, because the same is to be done to all of them.

    Attributes:
        sets: their indices. sizes: how many pairs compete for each. room: entries for them.
        folds: whether others are folded, or else lost. known: whether something was folded before.
    """

    sets: list[int]
    sizes: list[int]
    room: list[int]
    folds: bool
    known: bool


class Composer:
    """Composes the states of one rank of a model. It has a copy of the weights that it needs.

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
        self._rotated_map_after = weights[0].rotated_map_after
        pages = sequence.layouts
        self._layout, self._parts = pages[0], StateParts(pages)
        # Of all pages: `lam` of each sparse set and when it folds, and state heads, sparse sets per
        # KV head.
        of_sets = [page for page in pages for _ in range(page.num_sparse_heads)]
        self._lam = [page.sparse_cache_size for page in of_sets]
        self._folds_after = [page.folds_after for page in of_sets]
        self._share = self._layout.num_state_heads // self._layout.num_sparse_heads
        self._per_kv = self._layout.num_sparse_heads // self._layout.num_kv_heads
        self._kv_heads = range(len(self._lam) // self._per_kv)
        # [1 or 2, state heads, d, F] and [KV heads, d // 2 + d + 1], in the dtype of sums
        self._maps = torch.cat([own.key_maps.cpu() for own in weights], dim=1)
        self._importance = torch.cat([own.importance.cpu() for own in weights])
        self._dtype = torch.promote_types(self._layout.kv_dtype, torch.float32)

    def composition(self, lengths: Sequence[int]) -> Composition:
        """Where documents of so many tokens stand.

        Raises:
            ComposeError: they cannot be composed.
        """
        longest = MAX_LENGTH if self.schedule is not None else len(self.rope.cos)
        return Composition.of(self._layout, lengths, self.schedule, longest)

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
        rows = [row.numpy() for row, _ in full]
        out = torch.zeros(self.sequence.row_bytes, dtype=torch.uint8)
        evicted = self._exact_store(composition, rows, out.numpy())
        for run in self._runs(composition):
            self._sparse_sets(composition, run, rows, evicted, out.numpy())
        return out, composition.num_tokens

    def _exact_store(self, composition: Composition, rows: Sequence[Bytes], out: Bytes) -> Pairs:
        """Write the exact store, and return the pairs that leave the documents' own, `[sets, m,
        ...]`."""
        heads, size = self._kv_heads, self._layout.sink_size + self._layout.ring_size
        counts = [size] * len(heads)
        shape = len(heads), size, self._layout.head_dim
        stores = [torch.zeros(shape, dtype=self._layout.kv_dtype) for _ in "kv"]
        left_k, left_v = [], []
        for index, row in enumerate(rows):
            k, v = (
                self._parts.take([row], name, heads, [counts]).unflatten(0, (-1, size))
                for name in ("exact_k", "exact_v")
            )
            kept, left = composition.kept[index], composition.pooled[index]
            at = self._layout.row(kept.labels)
            stores[0][:, at] = self._moved(k, composition, index, kept)
            stores[1][:, at] = v[:, kept.source]
            left_k.append(self._moved(k, composition, index, left))
            left_v.append(v[:, left.source])
        for name, store in zip(("exact_k", "exact_v"), stores, strict=True):
            self._parts.put(out, name, heads, counts, store.flatten(0, 1))
        labels = torch.cat([left.labels for left in composition.pooled])
        return self._as_sparse(torch.cat(left_k, dim=1), torch.cat(left_v, dim=1), labels)

    def _moved(self, k: Tensor, composition: Composition, index: int, rows: Rows) -> Tensor:
        """Exact keys `[KV heads, m, d]` at their places in the composition."""
        by = composition.moves(index, rows.positions, rows.labels)
        return self.rope.move(k[:, rows.source].to(self._dtype), by).to(k.dtype)

    def _as_sparse(self, k: Tensor, v: Tensor, labels: Tensor) -> Pairs:
        """Pairs `[KV heads, m, d]` that leave the exact store, as they come into a sparse cache:
        those of each sparse set, `[sets, m, ...]`."""
        kept_k, kept_v = (quantize(x) if self._layout.int8_pairs else x for x in (k, v))
        w = self._importance.new_empty(len(k), 0)
        if self._layout.has_score_weights:
            pairs = kept_k.to(self._dtype), kept_v.to(self._dtype)
            w = pair_importance(*pairs, self._importance.to(self._dtype)[:, None])
        found = Pairs(kept_k, kept_v, labels.expand(len(k), -1), w)
        return found.each(lambda x: x.repeat_interleave(self._per_kv, dim=0))

    def _runs(self, composition: Composition) -> Iterator[SetBatch]:
        """All sparse sets: small ones together, large ones alone."""
        leaving = sum(len(rows.labels) for rows in composition.pooled)
        open_runs: dict[tuple[bool, bool], SetBatch] = {}
        for index, lam in enumerate(self._lam):
            room = min(composition.num_evicted, lam)
            size = leaving + sum(min(n, lam) for n in composition.evicted)
            folds = composition.num_evicted > self._folds_after[index]
            kind = folds, folds and max(composition.evicted) > lam
            run = open_runs.pop(kind, None)
            if run is not None and sum(run.sizes) + size > RUN_PAIRS:
                yield run
                run = None
            run = SetBatch([], [], [], *kind) if run is None else run
            for numbers, number in zip(run[:3], (index, size, room), strict=True):
                numbers.append(number)
            open_runs[kind] = run
        yield from open_runs.values()

    def _sparse_sets(
        self,
        composition: Composition,
        run: SetBatch,
        rows: Sequence[Bytes],
        evicted: Pairs,
        out: Bytes,
    ) -> None:
        counts = [[min(n, self._lam[i]) for i in run.sets] for n in composition.evicted]
        index = slice(run.sets[0], run.sets[-1] + 1) if len(run.sets) == 1 else run.sets
        left = evicted.each(lambda x: x[index].flatten(0, 1))
        pool = _joined(self._cached(composition, rows, run.sets, counts), left)
        if len(run.sets) > 1:
            each = [*counts, [evicted.labels.shape[1]] * len(run.sets)]
            pool = pool.of(_by_set(np.array(each)))
        heads = [i * self._share + j for j in range(self._share) for i in run.sets]
        hidden = self._sums(composition, run, rows, heads) if run.folds else None
        if run.folds or run.sizes != run.room:
            pool, hidden = self._choose(composition, run, pool, heads, hidden)
        if hidden is not None:
            H, s = hidden
            if self.schedule is not None:
                # The mass that a context shift leaves; models have met no sums of more pairs.
                most = 2.0 * self.schedule.length
                scale = (most / s.sum(-1, keepdim=True)).clamp(max=1)
                H, s = H * scale.unsqueeze(-1), s * scale
            features = [s.shape[1]] * len(heads)
            self._parts.put(out, "H", heads, features, H)
            self._parts.put(out, "s", heads, features, s)
        whole = {"positions": pool.labels}
        for name, pairs in (("sparse_k", pool.k), ("sparse_v", pool.v)):
            if isinstance(pairs, Int8Rows):
                whole |= {name: pairs.numbers, f"{name}_scale": pairs.scale}
            else:
                whole[name] = pairs
        if self._layout.has_score_weights:
            whole["score_weights"] = pool.w
        for name, values in whole.items():
            self._parts.put(out, name, run.sets, run.room, values)

    def _cached(
        self,
        composition: Composition,
        rows: Sequence[Bytes],
        sets: list[int],
        counts: list[list[int]],
    ) -> Pairs:
        def take(name: str) -> Tensor:
            return self._parts.take(rows, name, sets, counts)

        k, scales = take("sparse_k"), take("sparse_k_scale") if self._layout.int8_pairs else None
        moved, labels, sizes = [], [], [sum(own) for own in counts]
        for index, where in enumerate(take("positions").long().split_with_sizes(sizes)):
            labels.append(where + composition.offsets[index])
            by = composition.moves(index, where, labels[-1])
            at = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
            moved.append(
                self._rotated(k[at] if scales is None else Int8Rows(k[at], scales[at]), by)
            )
        v: Tensor | Int8Rows = take("sparse_v")
        if isinstance(v, Tensor) and scales is not None:
            v = Int8Rows(v, take("sparse_v_scale"))
        w = take("score_weights") if self._layout.has_score_weights else self._importance[:0, 0]
        return Pairs(_cat(moved), v, torch.cat(labels), w)

    def _rotated(self, k: Tensor | Int8Rows, by: Tensor) -> Tensor | Int8Rows:
        """Keys `[m, d]` of sparse caches so many positions later; rounded again where they move."""
        if not isinstance(k, Int8Rows):
            return self.rope.move(k.to(self._dtype), by).to(k.dtype)
        if not bool(by.any()):
            return k
        new = quantize(self.rope.move(k.to(self._dtype), by))
        if not by.dim():
            return new
        moves = by != 0
        return Int8Rows(
            torch.where(moves.unsqueeze(-1), new.numbers, k.numbers),
            torch.where(moves, new.scale, k.scale),
        )

    def _sums(
        self, composition: Composition, run: SetBatch, rows: Sequence[Bytes], heads: list[int]
    ) -> tuple[Tensor, Tensor]:
        """H `[heads, 2F, d]` and s `[heads, 2F]` of documents in which something was folded, added
        up."""
        size, lam = 2 * self._maps.shape[-1], [self._lam[i // self._share] for i in heads]
        dtype = self._layout.state_dtype
        H = torch.zeros(len(heads), size, self._layout.head_dim, dtype=dtype)
        s = torch.zeros(len(heads), size, dtype=dtype)
        for row, n in zip(rows, composition.evicted, strict=True):
            folded = [i for i, most in enumerate(lam) if n > most]
            if not folded:
                continue
            of = [heads[i] for i in folded]
            own_H, own_s = (
                self._parts.take([row], name, of, [[size] * len(of)]).unflatten(0, (-1, size))
                for name in ("H", "s")
            )
            if len(folded) == len(heads):
                H += own_H
                s += own_s
            else:
                H[folded] += own_H
                s[folded] += own_s
        return H, s

    def _choose(
        self,
        composition: Composition,
        run: SetBatch,
        pool: Pairs,
        heads: list[int],
        hidden: tuple[Tensor, Tensor] | None,
    ) -> tuple[Pairs, tuple[Tensor, Tensor] | None]:
        """The pairs of largest score, as many as there is room for, and the hidden state with the
        others folded in. Where nothing is folded, the others are lost.

        Scores are those of an update, but recent pairs are not preferred: they would all be the
        last document's.
        """
        maps = self._maps[-1 if composition.num_tokens > self._rotated_map_after else 0]
        v, phis = pool.v.to(self._dtype), list[Tensor]()
        norms = errors = _lengths(v)
        count = len(run.sets)
        by_share = [heads[j * count : (j + 1) * count] for j in range(self._share)]
        if run.known and hidden is not None:
            k = pool.k.to(self._dtype)
            phis = [_features(k, run.sizes, [maps[h] for h in of]) for of in by_share]
            errors = torch.stack(
                [
                    _lengths(v - _recalled(phi, run.sizes, *(x[j * count :] for x in hidden)))
                    for j, phi in enumerate(phis)
                ]
            )
        scores = errors  # where nothing was folded yet, the state recalls zeros
        if self._share > 1:
            scores = errors / norms.clamp(min=RECALL_EPS)
        if scores.dim() > 1:
            scores = scores.mean(0)
        if len(pool.w):
            scores = scores * pool.w.to(self._dtype)
        stays = _largest(scores.nan_to_num(nan=torch.inf, posinf=torch.inf), run)
        kept, rest = (torch.from_numpy(np.flatnonzero(x)) for x in (stays, ~stays))
        if hidden is not None:
            H, s = hidden
            sizes = [size - room for size, room in zip(run.sizes, run.room, strict=True)]
            folded_v = v.index_select(0, rest)
            left = None if phis else pool.of(rest).k.to(self._dtype)
            for j, of in enumerate(by_share):
                if left is None:
                    phi = phis[j].index_select(0, rest)
                else:
                    phi = _features(left, sizes, [maps[h] for h in of])
                pairs = zip(
                    phi.split_with_sizes(sizes), folded_v.split_with_sizes(sizes), strict=True
                )
                for i, (features, values) in enumerate(pairs, start=j * count):
                    H[i].addmm_(features.mT, values)
                    s[i] += features.sum(0)
        return pool.of(kept), hidden


def _features(k: Tensor, sizes: list[int], maps: Sequence[Tensor]) -> Tensor:
    """`reference.feature_map` of keys `[m, d]` of several sets, each with its own map `[d, F]`:
    `[m, 2F]`."""
    F = maps[0].shape[1]
    phi = k.new_empty(len(k), 2 * F)
    for rows, to, weight in zip(
        k.split_with_sizes(sizes), phi[:, :F].split_with_sizes(sizes), maps, strict=True
    ):
        torch.mm(rows, weight.to(k.dtype), out=to)
    torch.neg(phi[:, :F], out=phi[:, F:])
    return phi.unflatten(1, (2, F)).softmax(-1).flatten(1).clamp_(min=FEATURE_FLOOR)


def _recalled(phi: Tensor, sizes: list[int], H: Tensor, s: Tensor) -> Tensor:
    """What hidden states, one of each set, recall of its pairs: `[m, d]`."""
    found, mass = phi.new_empty(len(phi), H.shape[-1]), phi.new_empty(len(phi))
    outs = zip(
        phi.split_with_sizes(sizes),
        found.split_with_sizes(sizes),
        mass.split_with_sizes(sizes),
        strict=True,
    )
    for i, (features, to, sum_to) in enumerate(outs):
        torch.mm(features, H[i], out=to)
        torch.mv(features, s[i], out=sum_to)
    found /= (mass + RECALL_EPS).unsqueeze(-1)
    return found


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, x).sqrt_()


def _largest(scores: Tensor, run: SetBatch) -> np.ndarray:
    """A mask `[m]` of the pairs of largest score, as many as there is room for in each set. Equal
    ones in their order."""
    stays = np.zeros(len(scores), dtype=bool)
    at = 0
    for size, room in zip(run.sizes, run.room, strict=True):
        own, mask = scores.numpy()[at : at + size], stays[at : at + size]
        at += size
        if room:
            least = np.partition(own, size - room)[size - room]
            np.greater(own, least, out=mask)
            mask[np.flatnonzero(own == least)[: room - int(mask.sum())]] = True
    return stays


def _by_set(counts: NDArray[np.int64]) -> Tensor:
    """Indices that bring rows which lie part by part, and in each set by set, into the order of
    sets, and in each of parts.

    Args:
        counts: `[parts, sets]`, of rows.
    """
    ends = counts.cumsum().reshape(counts.shape)
    starts, sizes = (ends - counts).T.flatten(), counts.T.flatten()
    into = np.repeat(starts - (sizes.cumsum() - sizes), sizes)
    return torch.from_numpy(into + np.arange(len(into)))


def _joined(one: Pairs, other: Pairs) -> Pairs:
    return Pairs(
        _cat([one.k, other.k]),
        _cat([one.v, other.v]),
        torch.cat([one.labels, other.labels]),
        torch.cat([one.w, other.w]),
    )


def _cat(rows: Sequence[Tensor | Int8Rows]) -> Tensor | Int8Rows:
    if isinstance(rows[0], Int8Rows):
        return Int8Rows(*(torch.cat(list(x)) for x in zip(*rows, strict=True)))
    return torch.cat(rows)  # type: ignore[arg-type]
