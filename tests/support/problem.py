"""Random LoLA problems, whose truth is the reference's, and how they are fed to a back end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lola_vllm.core.lola_config import LolaConfig, importance_size
from lola_vllm.core.ops import context_shift
from lola_vllm.core.ops.contract import (
    DecodeBatch,
    DecodeOp,
    LayerState,
    LolaWeights,
    PrefillBatch,
    PrefillOp,
)
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.reference import LolaState, lola_attention
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import LayerLayout, StateLayout

STATE_INDEX = 2  # the page of a sequence that is alone


class Ops(Protocol):
    """A back end: its module, or an object with its two functions."""

    decode: DecodeOp
    prefill: PrefillOp


@dataclass
class Problem:
    """One layer's inputs for one sequence, and its weights.

    Attributes:
        q: `[T, Hq, d]`. k, v: `[T, Hkv, d]`.
        feature_map_q: `[Hq, d, F]`. feature_map_k: `[Hs, d, F]`. window_factors: `[Hq]`.
        importance: `[Hkv, d // 2 + d + 1]`, or None.
        rotation: of context shifts, in float64; None where there are none.
        sink_logits: `[Hq]`, of learned sinks, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    feature_map_q: Tensor
    feature_map_k: Tensor
    window_factors: Tensor
    config: LolaConfig
    importance: Tensor | None = None
    rotation: KeyRotation | None = None
    sink_logits: Tensor | None = None

    def reference(self) -> tuple[Tensor, LolaState]:
        """The truth, in float64 (from float32 or bfloat16 inputs too)."""
        tensors = (self.q, self.k, self.v, self.feature_map_q, self.feature_map_k)
        doubles = [t.double() for t in (*tensors, self.window_factors)]
        importance = None if self.importance is None else self.importance.double()
        return lola_attention(*doubles, self.config, importance, self.rotation, self.sink_logits)

    def weights(self) -> LolaWeights:
        """As a layer has them."""
        return LolaWeights.prepare(
            self.feature_map_q,
            self.feature_map_k,
            self.window_factors,
            self.config.mixing,
            self.k.shape[1],
            self.importance,
            self._rotation(),
            self.sink_logits,
        )

    def layout(self) -> StateLayout:
        """Of the pages; H and s in float64 where the inputs are."""
        return StateLayout.from_config(
            self.config,
            num_kv_heads=self.k.shape[1],
            num_state_heads=self.feature_map_k.shape[0],
            head_dim=self.q.shape[-1],
            feature_dim=self.feature_map_k.shape[-1],
            kv_dtype=self.k.dtype,
            importance=self.importance is not None or self.rotation is not None,
        )

    def state(self, num_pages: int = 4, extra_stride: int = 0) -> LayerState:
        """The layer with pages on the problem's device, whose every float is NaN.

        Args:
            extra_stride: bytes between a page's end and the next page.
        """
        shape = (num_pages, self.layout().page_bytes + extra_stride)
        pages = torch.full(shape, 0xFF, dtype=torch.uint8, device=self.q.device)
        return self.bind(pages)

    def bind(self, pages: Tensor) -> LayerState:
        """The layer with pages that are there already."""
        return LayerState.bind(self.weights(), LayerLayout((self.layout(),)), pages)

    def _rotation(self) -> KeyRotation | None:
        """As a layer has it: in float32, or in float64 where keys are."""
        if self.rotation is None:
            return None
        wide = torch.promote_types(self.k.dtype, torch.float32)
        cos, sin = (x.to(self.k.device, wide) for x in (self.rotation.cos, self.rotation.sin))
        return replace(self.rotation, cos=cos, sin=sin)

    def tokens(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the tokens `start` to `stop - 1`."""
        return self.q[start:stop], self.k[start:stop], self.v[start:stop]

    @property
    def schedule(self) -> ShiftSchedule | None:
        """Of its context shifts."""
        return self.rotation.schedule if self.rotation is not None else None

    def to(self, device: torch.device) -> Problem:
        """The same problem on a device."""
        moved = {k: x.to(device) for k, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def of_layer(self, other: Problem) -> Problem:
        """The same sequence in another problem's layer: with its weights."""
        return replace(
            self,
            feature_map_q=other.feature_map_q,
            feature_map_k=other.feature_map_k,
            window_factors=other.window_factors,
            importance=other.importance,
            sink_logits=other.sink_logits,
        )

    def of_head(self, head: int, config: LolaConfig | None = None) -> Problem:
        """The same of one KV head alone, with its query and state heads."""
        Hkv = self.k.shape[1]

        def own(x: Tensor, dim: int = 0) -> Tensor:
            return x.chunk(Hkv, dim)[head]

        return replace(
            self,
            q=own(self.q, 1),
            k=own(self.k, 1),
            v=own(self.v, 1),
            feature_map_q=own(self.feature_map_q),
            feature_map_k=own(self.feature_map_k),
            window_factors=own(self.window_factors),
            importance=None if self.importance is None else own(self.importance),
            sink_logits=None if self.sink_logits is None else own(self.sink_logits),
            config=config or self.config,
        )


def make_problem(
    T: int,
    config: LolaConfig,
    *,
    Hkv: int = 2,
    group: int = 3,
    Hs: int | None = None,
    d: int = 16,
    F: int = 8,
    importance: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    scale: float = 1.0,
    schedule: ShiftSchedule | None = None,
    rotated: int | None = None,
    sinks: bool = False,
) -> Problem:
    """A random problem; `scale` multiplies q and k, so logits grow with its square.

    Args:
        schedule: of context shifts, which rotate the first `rotated` (default: all) dimensions of
            a key.
        sinks: whether heads have learned sinks.
    """
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    Hq = Hkv * group
    tensors = [
        randn(T, Hq, d) * scale,
        randn(T, Hkv, d) * scale,
        randn(T, Hkv, d),
        randn(Hq, d, F) * 0.5,
        randn(Hs or Hkv, d, F) * 0.5,
    ]
    wide = torch.promote_types(dtype, torch.float32)
    factors = (randn(Hq) - 1).to(wide)
    weights = (randn(Hkv, importance_size(d)) * 0.3).to(wide) if importance else None
    rotation = None
    if schedule is not None:
        angles = schedule.interval * 10.0 ** -torch.arange((rotated or d) // 2).double()
        rotation = KeyRotation(schedule, angles.cos(), angles.sin())
    sink_logits = (randn(Hq) * scale).to(wide) if sinks else None
    tensors = [t.to(dtype) for t in tensors]
    return Problem(*tensors, factors, config, weights, rotation, sink_logits)


def with_a_trend(T: int, config: LolaConfig, **options: Any) -> Problem:
    """A problem whose values grow, so that old pairs leave again and again."""
    problem = make_problem(T, config, **options)
    trend = torch.linspace(1, 3, T).unsqueeze(-1).unsqueeze(-1)
    problem.v *= trend.to(problem.v.dtype)
    return problem


def unrecallable(
    interval: int, sharing: str, dtype: torch.dtype, importance: bool = False, **fields: Any
) -> Problem:
    """Four pairs of KV head 0 whose scores are NaN or infinite, for a cache of three.

    Whatever the interval, the oldest three are what stays of that head: 7, 9 and 14.
    """
    config = LolaConfig(
        window_size=4, sparse_cache_size=3, update_interval=interval,
        sparse_sharing=sharing, **fields,
    )  # fmt: skip
    problem = make_problem(40, config, Hs=6, dtype=dtype, importance=importance)
    problem.v[[7, 14, 16], 0] = torch.nan
    problem.v[9, 0] = torch.inf
    return problem


def full_attention(problem: Problem) -> Tensor:
    """Plain causal softmax attention, `[T, Hq, d]`."""
    q, k, v = (x.double().transpose(0, 1) for x in (problem.q, problem.k, problem.v))
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    ).transpose(0, 1)


def prefill(
    ops: Ops,
    problem: Problem,
    state: LayerState,
    start: int,
    stop: int,
    state_index: int = STATE_INDEX,
    skipped: int = 0,
) -> Tensor:
    """Answers to the tokens `start` to `stop - 1`, in one call.

    Args:
        skipped: the page is told that so many tokens more came before.
    """
    q, k, v = problem.tokens(start, stop)
    batch = PrefillBatch(
        torch.tensor([state_index], dtype=torch.int32, device=q.device),
        torch.tensor([0, stop - start]),
        torch.tensor([start + skipped]),
    )
    out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    segments = context_shift.split_prefill(problem.schedule, batch)
    shift = getattr(ops, "shift", None)
    context_shift.prefill(ops.prefill, state, q, k, v, segments, out, shift=shift)
    return out


def decode(
    ops: Ops,
    problem: Problem,
    state: LayerState,
    position: int,
    state_index: int = STATE_INDEX,
    skipped: int = 0,
) -> Tensor:
    """The answer to one token, `[1, Hq, d]`; `skipped` as in `prefill`."""
    q, k, v = problem.tokens(position, position + 1)
    batch = DecodeBatch(
        torch.tensor([state_index], dtype=torch.int32, device=q.device),
        torch.tensor([position + 1 + skipped], dtype=torch.int32, device=q.device),
    )
    out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    held = torch.tensor([position + skipped])
    context_shift.shift_due([state], batch.state_indices, held, getattr(ops, "shift", None))
    ops.decode(state, q, k, v, batch, out)
    return out


def feed(
    ops: Ops,
    problem: Problem,
    state: LayerState,
    cuts: Iterable[int] = (),
    decode_from: int | None = None,
    state_index: int = STATE_INDEX,
) -> Tensor:
    """Answers to a whole sequence, `[T, Hq, d]`.

    Args:
        cuts: where the pieces of the prompt end. decode_from: where the prompt ends and tokens
            are fed one by one; None: it does not.
    """
    T = len(problem.q)
    decode_from = T if decode_from is None else decode_from
    ends = sorted({c for c in cuts if 0 < c < decode_from} | ({decode_from} - {0}))
    answers = [
        prefill(ops, problem, state, start, stop, state_index)
        for start, stop in zip([0, *ends], ends, strict=False)
    ]
    answers += [decode(ops, problem, state, t, state_index) for t in range(decode_from, T)]
    return torch.cat(answers)


def run(
    ops: Ops,
    problem: Problem,
    cuts: Iterable[int] = (),
    *,
    decode_from: int | None = None,
    extra_stride: int = 0,
    device: torch.device | None = None,
) -> tuple[Tensor, LayerState]:
    """`feed` with a page between others that must stay as they are.

    Returns:
        The answers, and the state in host memory.
    """
    there = problem.to(device) if device else problem
    state = there.state(extra_stride=extra_stride)
    out = feed(ops, there, state, cuts, decode_from).cpu()
    pages = state.pages.cpu()
    for page in {0, 1, 2, 3} - {STATE_INDEX}:
        assert (pages[page] == 0xFF).all(), f"page {page} was touched"
    assert (pages[STATE_INDEX, state.layout.page_bytes :] == 0xFF).all()
    return out, problem.to(torch.device("cpu")).bind(pages)
