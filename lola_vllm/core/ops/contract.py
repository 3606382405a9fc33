"""What every back end's ops take: a layer, and the rows of a call.

A back end provides two functions that work in place on the pages of a `LayerState`:

    decode(layer, q, k, v, batch, out)
    prefill(layer, q, k, v, batch, out)

Both see each new token, write its pair, answer its query and, at an update point, evict, rescore,
select and fold. State index 0 is vLLM's null block: a row with 0 or less is padding, reads
and writes no page, and its output is zero. An op reads of a page only what the row's token count
says is valid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lola_vllm.core.lola_config import importance_size
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import NEVER, LayerLayout, StateLayout, StateViews


@dataclass(frozen=True)
class LolaWeights:
    """LoLA weights of a layer's heads on one rank, as ops take them.

    Attributes:
        feature_map_q: `[Hq, d, F]`.
        key_maps: `[1 or 2, Hs, d, F]`, what ops map keys by: the feature map of keys, and where
            contexts shift the rotated key map (`KeyRotation.rotated_map`), for pages that were
            shifted.
        gates: `[Hq, 2]`, of each query head log g - log(weight of the linear part), which is
            logit(g) for mixing "lola" and log g for "lolcats", and the logit of its learned sink,
            -inf where it has none (section 4 of `docs/algorithm.md`).
        subtract_max: the "lolcats" mixing weighs exact pairs relative to their largest logit.
        importance: `[Hkv, d // 2 + d + 1]`, what `reference.pair_importance` takes; `[0, ...]`
            where scores have no weights (`StateLayout.has_score_weights`).
        has_sinks: whether the base has learned sinks (gpt-oss).
        rotation: of keys, by a context shift; None where contexts do not shift.
            `core/ops/context_shift.py` does it between the ops.
    """

    feature_map_q: Tensor
    key_maps: Tensor
    gates: Tensor
    subtract_max: bool
    importance: Tensor
    has_sinks: bool
    rotation: KeyRotation | None = None

    @classmethod
    def prepare(
        cls,
        feature_map_q: Tensor,
        feature_map_k: Tensor,
        window_factors: Tensor,
        mixing: str,
        num_kv_heads: int,
        importance: Tensor | None = None,
        rotation: KeyRotation | None = None,
        sink_logits: Tensor | None = None,
    ) -> LolaWeights:
        """Make the weights of a layer from checkpoint tensors.

        Maps and importance are kept in float32 (float64 where the maps are that), in which they are
        applied. Where contexts shift, all scores have weights: without an importance a pair's is
        1 = exp(0) when it leaves the window.

        Args:
            feature_map_q, feature_map_k, importance: as the attributes; feature_map_k
                `[Hs, d, F]`. window_factors: `[Hq]`, logits of the gate g.
            mixing: "lola" or "lolcats". num_kv_heads: Hkv. rotation: as the attribute.
            sink_logits: `[Hq]`, of the base's learned sinks; None: it has none.
        """
        wide = torch.promote_types(feature_map_q.dtype, torch.float32)
        factors = window_factors.to(torch.promote_types(window_factors.dtype, torch.float32))
        lolcats = mixing == "lolcats"
        log_gate = torch.nn.functional.logsigmoid(factors) if lolcats else factors
        has_sinks = sink_logits is not None
        if sink_logits is None:
            sink_logits = torch.full_like(log_gate, -torch.inf)
        gates = torch.stack([log_gate, sink_logits.to(log_gate)], dim=1)
        if importance is None:
            weighed = num_kv_heads if rotation is not None else 0
            importance = log_gate.new_zeros(weighed, importance_size(feature_map_k.shape[1]))
        maps = feature_map_k.to(wide)[None]
        if rotation is not None and rotation.schedule.fold_rotation:
            maps = torch.cat([maps, rotation.rotated_map(maps[0])[None]])
        wide_q, importance = feature_map_q.to(wide), importance.to(wide)
        return cls(wide_q, maps, gates, lolcats, importance, has_sinks, rotation)

    @classmethod
    def of_window(
        cls,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mixing: str,
        like: Tensor,
        rotation: KeyRotation | None,
        sink_logits: Tensor | None = None,
    ) -> LolaWeights:
        """The weights of a sliding layer, which has no maps: F = 0, and a state head per KV head.

        Args:
            like: of the model's dtype, on its device.
        """
        none = like.new_empty(0)
        return cls.prepare(
            none.expand(num_heads, head_dim, 0),
            none.expand(num_kv_heads, head_dim, 0),
            like.new_zeros(num_heads),
            mixing,
            num_kv_heads,
            rotation=rotation,
            sink_logits=sink_logits,
        )

    def of_group(self, index: int, count: int, feature_dim: int) -> LolaWeights:
        """The part of group `index` of so many, of equal numbers of heads.

        Args:
            feature_dim: of its page: without a hidden state the group has no maps either.
        """

        def part(x: Tensor, dim: int = 0) -> Tensor:
            share = x.shape[dim] // count
            return x.narrow(dim, index * share, share).contiguous()

        return replace(
            self,
            feature_map_q=part(self.feature_map_q)[..., :feature_dim],
            key_maps=part(self.key_maps, 1)[..., :feature_dim],
            gates=part(self.gates),
            importance=part(self.importance),
        )

    @property
    def num_heads(self) -> int:
        """Query heads, Hq."""
        return len(self.gates)

    @property
    def sink_logits(self) -> Tensor | None:
        """`[Hq]`, of learned sinks; None: there are none."""
        return self.gates[:, 1] if self.has_sinks else None

    @property
    def rotated_map_after(self) -> int:
        """Pages with more tokens use the rotated key map; `NEVER`: none do."""
        if self.rotation is None or len(self.key_maps) == 1:
            return NEVER
        return self.rotation.schedule.length

    def maps_of(self, n: Tensor) -> Tensor:
        """The key maps of pages that hold n tokens: `[Hs, d, F]`, or `[len(n), Hs, d, F]`."""
        if len(self.key_maps) == 1:
            return self.key_maps[0]
        return self.key_maps[(n > self.rotated_map_after).long()]

    def check(self, layout: LayerLayout, pages: Tensor) -> None:
        """Raise what `LayerState.bind` raises."""
        page = layout.pages[0]
        d = page.head_dim
        F = layout.feature_dim or self.feature_map_q.shape[-1]  # maps that no head uses
        Hq, Hs, Hkv = self.num_heads, layout.num_state_heads, layout.num_kv_heads
        Hg = len(layout.sizes)
        if Hq % Hs or Hs % Hg or Hg % Hkv:
            raise ValueError(
                f"feature_map_k: {Hs} state heads do not lie between the {Hq} query heads, the "
                f"{Hg} sparse sets and the {Hkv} KV heads"
            )
        wide = torch.promote_types(page.kv_dtype, torch.float32)
        if page.has_score_weights != (len(self.importance) > 0):
            given = "given" if len(self.importance) else "none given"
            raise ValueError(
                f"importance: {given}, but the layout has has_score_weights = "
                f"{page.has_score_weights}"
            )
        shapes: dict[str, tuple[int, ...]] = {
            "feature_map_q": (Hq, d, F),
            "key_maps": (len(self.key_maps), Hs, d, F),
            "gates": (Hq, 2),
            "importance": (Hkv if page.has_score_weights else 0, importance_size(d)),
        }
        for name, shape in shapes.items():
            weight: Tensor = getattr(self, name)
            if tuple(weight.shape) != shape:
                raise ValueError(f"{name}: shape {list(weight.shape)}, expected {list(shape)}")
            if weight.dtype != wide or not weight.is_contiguous():
                raise ValueError(f"{name}: must be {wide} and contiguous, is {weight.dtype}")
            if weight.device != pages.device:
                raise ValueError(f"{name}: on {weight.device}, the pages on {pages.device}")
        if self.rotation is not None:
            self.rotation.check(d, wide, pages.device)


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """KV heads of a layer that share a page: all of them, or each alone (`LayerLayout`).

    KV heads do not see each other, so a kernel needs no more than a group.

    Attributes:
        weights: of these heads. layout: of every page.
        pages: `[N, >= layout.page_bytes]`, bytes: the pool's rows for this group.
        views: typed views of the same memory.
    """

    weights: LolaWeights
    layout: StateLayout
    pages: Tensor
    views: StateViews

    def alone(self, pages: Tensor) -> LayerState:
        """A layer of these heads alone, with pages of its own, `[N, >= layout.page_bytes]`."""
        return LayerState.bind(self.weights, LayerLayout((self.layout,)), pages)


@dataclass(frozen=True, eq=False)
class LayerState:
    """One layer's weights and pages on one rank, checked when they are bound.

    Attributes:
        weights: of all heads. layout: of the layer's bytes.
        pages: `[N, >= layout.page_bytes]`, bytes; the pool's rows for this layer.
        groups: its heads, in order, as those that share a page.
        table: `[len(groups), len(TABLE_FIELDS)]` int64 in host memory: `layout` as the C++ and CUDA
            ops read it (`PageLayout` in `csrc/layout.h`).
        device_table: `table` on the device of the pages, for kernels that take all groups at once.
    """

    weights: LolaWeights
    layout: LayerLayout
    pages: Tensor
    groups: tuple[HeadGroup, ...]
    table: Tensor
    device_table: Tensor

    @classmethod
    def bind(cls, weights: LolaWeights, layout: LayerLayout, pages: Tensor) -> LayerState:
        """Check that weights, layout and pages fit each other.

        Args:
            pages: `[N, >= layout.page_bytes]` of a one-byte dtype; the row stride must be a
                multiple of 8.

        Raises:
            ValueError: the rows of `pages` are too short, a weight or row of the rotation has
                another shape, dtype or device than layout and pages ask for, or importance is there
                and should not be, or the other way; names the argument.
        """
        parts = [
            (page, own, page.views(own))
            for page, own in zip(layout.pages, layout.split(pages), strict=True)
        ]
        weights.check(layout, pages)
        groups = tuple(
            HeadGroup(weights.of_group(i, len(parts), part[0].feature_dim), *part)
            for i, part in enumerate(parts)
        )
        table = layout.table(weights.num_heads, weights.subtract_max, weights.rotated_map_after)
        return cls(weights, layout, pages, groups, table, table.to(pages.device))

    def with_weights(self, weights: LolaWeights) -> LayerState:
        """The same pages with other weights of the same shapes, which are not checked again."""
        count = len(self.groups)
        groups = tuple(
            replace(group, weights=weights.of_group(i, count, group.layout.feature_dim))
            for i, group in enumerate(self.groups)
        )
        return replace(self, weights=weights, groups=groups)

    @property
    def schedule(self) -> ShiftSchedule | None:
        """The schedule of its context shifts; None where contexts do not shift."""
        return None if self.weights.rotation is None else self.weights.rotation.schedule


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


B = TypeVar("B", contravariant=True)  # the rows


class Op(Protocol[B]):
    """Decode, one new token per row, or prefill, a segment of new tokens per row, from an empty or
    a live page."""

    def __call__(
        self, layer: LayerState, q: Tensor, k: Tensor, v: Tensor, batch: B, out: Tensor, /
    ) -> None:
        """q and out `[T, Hq, d]`, k and v `[T, Hkv, d]` in the pages' dtype."""


DecodeOp = Op[DecodeBatch]
PrefillOp = Op[PrefillBatch]
# The layers of a model, and the pages to shift with the tokens that each holds.
ShiftOp = Callable[[Sequence["LayerState"], Tensor, Tensor], None]


@dataclass(frozen=True)
class Backend:
    """The ops chosen for a device.

    Attributes:
        name: for the log. decode, prefill: the ops.
        warm_up: compiles what a layer's steps can ask for, before the first of them; it touches no
            page.
        shift: `context_shift.shift_layers` on the device; None: in plain torch.
        capturable: `decode` launches the same kernels whatever the token counts and waits for
            nothing, so that a CUDA graph can hold it.
    """

    name: str
    decode: DecodeOp
    prefill: PrefillOp
    warm_up: Callable[[LayerState], None] | None = None
    shift: ShiftOp | None = None
    capturable: bool = False
