"""What every back end's ops take: a layer's state, and the rows of a call.

A back end provides two functions that work in place on the pages of a `LayerState`:

    decode(state, q, k, v, batch, out)
    prefill(state, q, k, v, batch, out)

Both see each new token, write its pair, answer its query and, at an update point, evict, rescore,
select and fold. State index 0 is vLLM's null block: a row with 0 or less is padding, reads
and writes no page, and its output is zero. An op reads of a page only what the row's token count
says is valid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lola_vllm.config import importance_size
from lola_vllm.ops.key_rotation import KeyRotation
from lola_vllm.state import NEVER, TABLE_FIELDS, LayerLayout, StateLayout, StateViews


def _scores_decay(rotation: KeyRotation | None) -> bool:
    return rotation is not None and rotation.schedule.score_decay > 0


def _rotated_map_after(rotation: KeyRotation | None) -> int:
    """Pages with more tokens use the rotated key map; `NEVER`: none do."""
    return (
        rotation.schedule.length
        if rotation is not None and rotation.schedule.fold_rotation
        else NEVER
    )


@dataclass(frozen=True)
class LolaWeights:
    """A layer's LoLA weights on one rank.

    Attributes:
        feature_map_q: `[Hq, d, F]`. feature_map_k: `[Hs, d, F]`.
        log_gate: `[Hq]`, log g - log(weight of the linear part): logit(g) for mixing "lola",
            log g for "lolcats" (section 4 of `docs/algorithm.md`).
        subtract_max: the "lolcats" mixing weighs exact pairs relative to their largest logit.
        importance: `[Hkv, d // 2 + d + 1]` or None, what `reference.pair_importance` takes.
        key_maps: `[1 or 2, Hs, d, F]`, what ops map keys by: `feature_map_k`, and where contexts
            shift the rotated key map (`KeyRotation.rotated_map`), for pages that were shifted. None
            until weights are bound.
    """

    feature_map_q: Tensor
    feature_map_k: Tensor
    log_gate: Tensor
    subtract_max: bool
    importance: Tensor | None = None
    key_maps: Tensor | None = None

    @classmethod
    def prepare(
        cls,
        feature_map_q: Tensor,
        feature_map_k: Tensor,
        window_factors: Tensor,
        mixing: str,
        importance: Tensor | None = None,
    ) -> LolaWeights:
        """From checkpoint tensors; `window_factors [Hq]` are logits of the gate g.

        Maps and importance are kept in float32 (float64 where the maps are that), in which they are
        applied.
        """
        wide = torch.promote_types(feature_map_q.dtype, torch.float32)
        factors = window_factors.to(torch.promote_types(window_factors.dtype, torch.float32))
        lolcats = mixing == "lolcats"
        log_gate = torch.nn.functional.logsigmoid(factors) if lolcats else factors
        importance = None if importance is None else importance.to(wide)
        return cls(feature_map_q.to(wide), feature_map_k.to(wide), log_gate, lolcats, importance)

    def of_head(self, index: int, num_kv_heads: int) -> LolaWeights:
        """The part of KV head `index` of so many."""

        def part(x: Tensor, dim: int = 0) -> Tensor:
            share = x.shape[dim] // num_kv_heads
            return x.narrow(dim, index * share, share).contiguous()

        return LolaWeights(
            part(self.feature_map_q),
            part(self.feature_map_k),
            part(self.log_gate),
            self.subtract_max,
            None if self.importance is None else part(self.importance),
            None if self.key_maps is None else part(self.key_maps, 1),
        )

    def completed(
        self, layout: StateLayout, rotation: KeyRotation | None, pages: int = 1
    ) -> LolaWeights:
        """With `key_maps`, and with zeros as importance where scores decay and nothing else weighs
        them: w = exp(0) for a pair that leaves the window.

        Args:
            layout: of a page. pages: that the weights are of.
        """
        maps, importance = self.key_maps, self.importance
        if maps is None:
            maps = self.feature_map_k[None]
            if rotation is not None and _rotated_map_after(rotation) < NEVER:
                maps = torch.cat([maps, rotation.rotated_map(self.feature_map_k)[None]])
        if importance is None and layout.has_score_weights and _scores_decay(rotation):
            shape = pages * layout.num_kv_heads, importance_size(layout.head_dim)
            wide = torch.promote_types(layout.kv_dtype, torch.float32)
            importance = self.log_gate.new_zeros(shape, dtype=wide)
        return replace(self, importance=importance, key_maps=maps)

    def maps_of(self, n: Tensor, rotation: KeyRotation | None) -> Tensor:
        """The key maps of pages that hold n tokens: `[Hs, d, F]`, or `[len(n), Hs, d, F]`."""
        assert self.key_maps is not None
        if len(self.key_maps) == 1:
            return self.key_maps[0]
        return self.key_maps[(n > _rotated_map_after(rotation)).long()]


@dataclass(frozen=True, eq=False)
class LayerState:
    """One layer's weights and pages on one rank, checked when they are bound.

    Attributes:
        weights: the layer's. layout: of every page.
        pages: `[N, >= layout.page_bytes]`, bytes; the pool's rows for this layer.
        views: typed views of the same memory.
        table: `[len(TABLE_FIELDS)]` int64 in host memory: `layout` as the C++ and CUDA ops read it
            (`PageLayout` in `csrc/layout.h`).
        rotation: of keys, by a context shift; None where contexts do not shift.
            `ops/context_shift.py` does it between the ops.
    """

    weights: LolaWeights
    layout: StateLayout
    pages: Tensor
    views: StateViews
    table: Tensor
    rotation: KeyRotation | None = None

    @classmethod
    def bind(
        cls,
        weights: LolaWeights,
        layout: StateLayout,
        pages: Tensor,
        rotation: KeyRotation | None = None,
    ) -> LayerState:
        """Check that weights, layout, pages and rotation fit each other.

        Args:
            pages: `[N, >= layout.page_bytes]` of a one-byte dtype; the row stride must be a
                multiple of 8.

        Raises:
            ValueError: the rows of `pages` are too short, a weight or table row has another shape,
                dtype or device than layout and pages ask for, or importance is there and should not
                be, or the other way; names the argument.
        """
        views = layout.views(pages)
        Hq, d, F = len(weights.log_gate), layout.head_dim, layout.feature_dim
        Hs = layout.num_state_heads
        if Hq % Hs or Hs % layout.num_sparse_heads or layout.num_sparse_heads % layout.num_kv_heads:
            raise ValueError(
                f"feature_map_k: {Hs} state heads do not lie between the {Hq} query heads, the "
                f"{layout.num_sparse_heads} sparse sets and the {layout.num_kv_heads} KV heads"
            )
        wide = torch.promote_types(layout.kv_dtype, torch.float32)
        weighted = weights.importance is not None
        if layout.has_score_weights != weighted and not (
            layout.has_score_weights and _scores_decay(rotation)
        ):
            given = "given" if weighted else "none given"
            raise ValueError(
                f"importance: {given}, but the layout has has_score_weights = "
                f"{layout.has_score_weights}"
            )
        shapes: dict[str, tuple[int, ...]] = {
            "feature_map_q": (Hq, d, F),
            "feature_map_k": (Hs, d, F),
            "log_gate": (Hq,),
        }
        if weights.importance is not None:
            shapes["importance"] = (layout.num_kv_heads, importance_size(d))
        for name, shape in shapes.items():
            weight: Tensor = getattr(weights, name)
            if tuple(weight.shape) != shape:
                raise ValueError(f"{name}: shape {list(weight.shape)}, expected {list(shape)}")
            if weight.dtype != wide or not weight.is_contiguous():
                raise ValueError(f"{name}: must be {wide} and contiguous, is {weight.dtype}")
            if weight.device != pages.device:
                raise ValueError(f"{name}: on {weight.device}, the pages on {pages.device}")
        if rotation is not None:
            for name, row in (("rotation.cos", rotation.cos), ("rotation.sin", rotation.sin)):
                if row.shape != rotation.cos.shape or row.dim() != 1 or not 0 < 2 * len(row) <= d:
                    raise ValueError(
                        f"{name}: shape {list(row.shape)}, expected at most {d // 2} angles"
                    )
                if row.dtype != wide or row.device != pages.device:
                    raise ValueError(
                        f"{name}: must be {wide} on {pages.device}, is {row.dtype} on {row.device}"
                    )
        weights = weights.completed(layout, rotation)
        table = layout.table(Hq, weights.subtract_max, _rotated_map_after(rotation))
        return cls(weights, layout, pages, views, table, rotation)

    @property
    def num_heads(self) -> int:
        """Query heads of this rank, Hq."""
        return len(self.weights.log_gate)

    @property
    def rotated_map_after(self) -> int:
        """Pages with more tokens use the rotated key map; `NEVER`: none
        do."""
        return _rotated_map_after(self.rotation)


@dataclass(frozen=True, eq=False)
class HeadStates:
    """A layer whose KV heads have a page each, as their sparse caches differ in size.

    Attributes:
        weights: the layer's. layout: the heads'. pages: `[N, >= layout.page_bytes]`, bytes.
        heads: of each KV head, with its part of weights and pages.
        table: `[Hkv, len(TABLE_FIELDS)]` int64 in host memory: the heads' layouts as the C++ ops
            read them, with offsets in the layer's bytes.
    """

    weights: LolaWeights
    layout: LayerLayout
    pages: Tensor
    heads: tuple[LayerState, ...]
    table: Tensor

    @property
    def rotation(self) -> KeyRotation | None:
        """Of keys, by a context shift, as in `LayerState`."""
        return self.heads[0].rotation


State = LayerState | HeadStates


def bind_layer(
    weights: LolaWeights, layout: LayerLayout, pages: Tensor, rotation: KeyRotation | None = None
) -> State:
    """A layer's state, with one page or with a page per KV head; as `LayerState.bind`."""
    if len(layout.pages) == 1:
        return LayerState.bind(weights, layout.pages[0], pages, rotation)
    count = len(layout.pages)
    heads = tuple(
        LayerState.bind(weights.of_head(i, count), page, own, rotation)
        for i, (page, own) in enumerate(zip(layout.pages, layout.split(pages), strict=True))
    )
    rows = []
    for offset, head in zip(layout.offsets, heads, strict=True):
        row = head.table.clone()
        row[TABLE_FIELDS.index("page_bytes") :] += offset  # and the offsets, which follow it
        rows.append(row)
    return HeadStates(
        weights.completed(layout.pages[0], rotation, count), layout, pages, heads, torch.stack(rows)
    )


def with_weights(state: State, weights: LolaWeights, rotation: KeyRotation | None) -> State:
    """The same pages with other weights of the same shapes, which are not checked again."""
    if isinstance(state, LayerState):
        return replace(state, weights=weights.completed(state.layout, rotation), rotation=rotation)
    count = len(state.heads)
    weights = weights.completed(state.heads[0].layout, rotation, count)
    heads = tuple(
        replace(
            head,
            weights=weights.of_head(i, count).completed(head.layout, rotation),
            rotation=rotation,
        )
        for i, head in enumerate(state.heads)
    )
    return replace(state, weights=weights, heads=heads)


class DecodeBatch(NamedTuple):
    """The rows of a decode step: one new token each.

    Attributes:
        state_indices: `[B]` integer, each row's page.
        seq_lens: `[B]` integer; they count the new token, whose position is `seq_lens - 1`.
    """

    state_indices: Tensor
    seq_lens: Tensor


class PrefillBatch(NamedTuple):
    """The rows of a prefill step: a segment of new tokens each.

    Attributes:
        state_indices: `[R]` integer, each row's page.
        query_start_loc: `[R + 1]` integer in host memory; row r has the tokens from entry r to
            entry r + 1.
        context_lens: `[R]` integer in host memory: tokens that are in each page already. Back ends
            plan from host memory without waiting for the device.
    """

    state_indices: Tensor
    query_start_loc: Tensor
    context_lens: Tensor


S = TypeVar("S", contravariant=True)  # what a layer is given as
B = TypeVar("B", contravariant=True)  # the rows


class Op(Protocol[S, B]):
    """Decode, one new token per row, or prefill, a segment of new tokens per row, from an empty or
    a live page."""

    def __call__(self, state: S, q: Tensor, k: Tensor, v: Tensor, batch: B, out: Tensor) -> None:
        """q and out `[T, Hq, d]`, k and v `[T, Hkv, d]` in the pages' dtype."""


# For a layer with one page, which is all that kernels need to know.
DecodeOp = Op[LayerState, DecodeBatch]
PrefillOp = Op[LayerState, PrefillBatch]
# For any layer.
LayerDecode = Op[State, DecodeBatch]
LayerPrefill = Op[State, PrefillBatch]


class WarmUp(Protocol):
    """Compiles what a layer's steps can ask for, before the first of them."""

    def __call__(self, state: LayerState) -> None:
        """Touches no page."""


@dataclass(frozen=True)
class Backend:
    """The ops chosen for a device.

    Attributes:
        name: for the log. decode, prefill: the ops. warm_up: of each `LayerState`.
        capturable: `decode` launches the same kernels whatever the token counts and waits for
            nothing, so that a CUDA graph can hold it.
    """

    name: str
    decode: LayerDecode
    prefill: LayerPrefill
    warm_up: WarmUp | None = None
    capturable: bool = False
