"""What every back end's ops take: a layer's state, and the rows of a call.

A back end provides two functions that work in place on the pages of a `LayerState`:

    decode(state, q, k, v, batch, out)
    prefill(state, q, k, v, batch, out)

Both see each new token, write its pair, answer its query and, at an update point, evict, rescore,
select and fold. Slot 0 is vLLM's null block: a row with slot <= 0 is padding, reads and writes no
page, and its output is zero. An op reads of a page only what the row's token count says is valid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lola_vllm.config import saliency_size
from lola_vllm.ops.places import Turn
from lola_vllm.state import NEVER, TABLE_FIELDS, LayerLayout, StateLayout, StateViews


def _scores_fade(turn: Turn | None) -> bool:
    return turn is not None and turn.places.score_fade > 0


def _turned_after(turn: Turn | None) -> int:
    """Pages with more tokens map keys by the second of `LolaWeights.key_maps`; `NEVER`: none do."""
    return turn.places.length if turn is not None and turn.places.fold_ahead else NEVER


@dataclass(frozen=True)
class LolaWeights:
    """A layer's LoLA weights on one rank.

    Attributes:
        feature_map_q: `[Hq, d, F]`. feature_map_k: `[Hs, d, F]`.
        log_gate: `[Hq]`, log g - log(weight of the linear part): logit(g) for mixing "lola",
            log g for "lolcats" (section 4 of `docs/algorithm.md`).
        subtract_max: the "lolcats" mixing weighs exact pairs relative to their largest logit.
        saliency: `[Hkv, d // 2 + d + 1]` or None, what `reference.pair_saliency` takes.
        key_maps: `[1 or 2, Hs, d, F]`, what ops map keys by: `feature_map_k`, and where there is a
            second one, the map for pages that were rebased (`Turn.maps_ahead`). None until weights
            are bound.
    """

    feature_map_q: Tensor
    feature_map_k: Tensor
    log_gate: Tensor
    subtract_max: bool
    saliency: Tensor | None = None
    key_maps: Tensor | None = None

    @classmethod
    def prepare(
        cls,
        feature_map_q: Tensor,
        feature_map_k: Tensor,
        window_factors: Tensor,
        mixing: str,
        saliency: Tensor | None = None,
    ) -> LolaWeights:
        """From checkpoint tensors; `window_factors [Hq]` are logits of the gate g.

        Maps and saliency are kept in float32 (float64 where the maps are that), in which they are
        applied.
        """
        wide = torch.promote_types(feature_map_q.dtype, torch.float32)
        factors = window_factors.to(torch.promote_types(window_factors.dtype, torch.float32))
        lolcats = mixing == "lolcats"
        log_gate = torch.nn.functional.logsigmoid(factors) if lolcats else factors
        saliency = None if saliency is None else saliency.to(wide)
        return cls(feature_map_q.to(wide), feature_map_k.to(wide), log_gate, lolcats, saliency)

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
            None if self.saliency is None else part(self.saliency),
            None if self.key_maps is None else part(self.key_maps, 1),
        )

    def completed(self, layout: StateLayout, turn: Turn | None) -> LolaWeights:
        """With `key_maps`, and with zeros as saliency where scores fade and nothing else weighs
        them: w = exp(0) for a pair that leaves the window."""
        maps, saliency = self.key_maps, self.saliency
        if maps is None:
            maps = self.feature_map_k[None]
            if turn is not None and _turned_after(turn) < NEVER:
                maps = torch.cat([maps, turn.maps_ahead(self.feature_map_k)[None]])
        if saliency is None and layout.has_saliency and _scores_fade(turn):
            shape = layout.num_kv_heads, saliency_size(layout.head_dim)
            wide = torch.promote_types(layout.kv_dtype, torch.float32)
            saliency = self.log_gate.new_zeros(shape, dtype=wide)
        return replace(self, saliency=saliency, key_maps=maps)

    def maps_of(self, n: Tensor, turn: Turn | None) -> Tensor:
        """The key maps of pages that hold n tokens: `[Hs, d, F]`, or `[len(n), Hs, d, F]`."""
        assert self.key_maps is not None
        if len(self.key_maps) == 1:
            return self.key_maps[0]
        return self.key_maps[(n > _turned_after(turn)).long()]


@dataclass(frozen=True, eq=False)
class LayerState:
    """One layer's weights and pages on one rank, checked when they are bound.

    Attributes:
        weights: the layer's. layout: of every page.
        pages: `[N, >= layout.page_bytes]`, bytes; the pool's rows for this layer.
        views: typed views of the same memory.
        table: `[len(TABLE_FIELDS)]` int64 in host memory: `layout` as the C++ and CUDA ops read it
            (`PageLayout` in `csrc/layout.h`).
        turn: how a rebase turns keys back; None where places are positions. `ops/rebase.py` does
            it between the ops.
    """

    weights: LolaWeights
    layout: StateLayout
    pages: Tensor
    views: StateViews
    table: Tensor
    turn: Turn | None = None

    @classmethod
    def bind(
        cls, weights: LolaWeights, layout: StateLayout, pages: Tensor, turn: Turn | None = None
    ) -> LayerState:
        """Check that weights, layout, pages and turn fit each other.

        Args:
            pages: `[N, >= layout.page_bytes]` of a one-byte dtype; the row stride must be a
                multiple of 8.

        Raises:
            ValueError: the rows of `pages` are too short, a weight or table row has another shape,
                dtype or device than layout and pages ask for, or saliency is there and should not
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
        weighed = weights.saliency is not None
        if layout.has_saliency != weighed and not (layout.has_saliency and _scores_fade(turn)):
            given = "given" if weighed else "none given"
            raise ValueError(
                f"saliency: {given}, but the layout has has_saliency = {layout.has_saliency}"
            )
        shapes: dict[str, tuple[int, ...]] = {
            "feature_map_q": (Hq, d, F),
            "feature_map_k": (Hs, d, F),
            "log_gate": (Hq,),
        }
        if weights.saliency is not None:
            shapes["saliency"] = (layout.num_kv_heads, saliency_size(d))
        for name, shape in shapes.items():
            weight: Tensor = getattr(weights, name)
            if tuple(weight.shape) != shape:
                raise ValueError(f"{name}: shape {list(weight.shape)}, expected {list(shape)}")
            if weight.dtype != wide or not weight.is_contiguous():
                raise ValueError(f"{name}: must be {wide} and contiguous, is {weight.dtype}")
            if weight.device != pages.device:
                raise ValueError(f"{name}: on {weight.device}, the pages on {pages.device}")
        if turn is not None:
            for name, row in (("turn.cos", turn.cos), ("turn.sin", turn.sin)):
                if row.shape != turn.cos.shape or row.dim() != 1 or not 0 < 2 * len(row) <= d:
                    raise ValueError(
                        f"{name}: shape {list(row.shape)}, expected at most {d // 2} angles"
                    )
                if row.dtype != wide or row.device != pages.device:
                    raise ValueError(
                        f"{name}: must be {wide} on {pages.device}, is {row.dtype} on {row.device}"
                    )
        weights = weights.completed(layout, turn)
        table = layout.table(Hq, weights.subtract_max, _turned_after(turn))
        return cls(weights, layout, pages, views, table, turn)

    @property
    def num_heads(self) -> int:
        """Query heads of this rank, Hq."""
        return len(self.weights.log_gate)

    @property
    def turned_after(self) -> int:
        """Pages with more tokens map keys by the second of `LolaWeights.key_maps`; `NEVER`: none
        do."""
        return _turned_after(self.turn)


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
    def turn(self) -> Turn | None:
        """How a rebase turns keys back, as in `LayerState`."""
        return self.heads[0].turn


State = LayerState | HeadStates


def bind_layer(
    weights: LolaWeights, layout: LayerLayout, pages: Tensor, turn: Turn | None = None
) -> State:
    """A layer's state, with one page or with a page per KV head; as `LayerState.bind`."""
    if len(layout.pages) == 1:
        return LayerState.bind(weights, layout.pages[0], pages, turn)
    count = len(layout.pages)
    heads = tuple(
        LayerState.bind(weights.of_head(i, count), page, own, turn)
        for i, (page, own) in enumerate(zip(layout.pages, layout.split(pages), strict=True))
    )
    rows = []
    for offset, head in zip(layout.offsets, heads, strict=True):
        row = head.table.clone()
        row[TABLE_FIELDS.index("page_bytes") :] += offset  # and the offsets, which follow it
        rows.append(row)
    return HeadStates(
        weights.completed(layout.pages[0], turn), layout, pages, heads, torch.stack(rows)
    )


def with_weights(state: State, weights: LolaWeights, turn: Turn | None) -> State:
    """The same pages with other weights of the same shapes, which are not checked again."""
    if isinstance(state, LayerState):
        return replace(state, weights=weights.completed(state.layout, turn), turn=turn)
    count = len(state.heads)
    weights = weights.completed(state.heads[0].layout, turn)
    heads = tuple(
        replace(head, weights=weights.of_head(i, count).completed(head.layout, turn), turn=turn)
        for i, head in enumerate(state.heads)
    )
    return replace(state, weights=weights, heads=heads)


class DecodeBatch(NamedTuple):
    """The rows of a decode step: one new token each.

    Attributes:
        slots: `[B]` integer, each row's page.
        seq_lens: `[B]` integer; they count the new token, whose position is `seq_lens - 1`.
    """

    slots: Tensor
    seq_lens: Tensor


class PrefillBatch(NamedTuple):
    """The rows of a prefill step: a segment of new tokens each.

    Attributes:
        slots: `[R]` integer, each row's page.
        query_start_loc: `[R + 1]` integer in host memory; row r has the tokens from entry r to
            entry r + 1.
        context_lens: `[R]` integer in host memory: tokens that are in each page already. Back ends
            plan from host memory without waiting for the device.
    """

    slots: Tensor
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
