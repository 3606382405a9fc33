"""Whether a back end is right on this machine: a small layer of the model's layout, against torch.

Kernels were compiled for GPUs and CPUs that no test has seen. So before a layer serves, the back
end goes through a prompt, a context shift, decode and updates beside the portable one, and what it
answers and what it leaves in the pages is compared. What differs is named, and the next back end
serves. A user with an unknown device gets a right answer or a clear word.

The small layer has the model's heads, sizes of heads and features, window, interval and dtypes,
with random weights. Its sparse caches are smaller (`MOST_PAIRS`), so that a short text fills them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.core.lola_config import LolaConfig, importance_size
from lola_vllm.core.ops import context_shift, portable
from lola_vllm.core.ops.contract import (
    Backend,
    DecodeBatch,
    LayerState,
    LolaWeights,
    PrefillBatch,
)
from lola_vllm.core.ops.int8 import Int8Rows
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.select import backends, next_backend
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import LayerLayout, StateLayout, StateViews

logger = logging.getLogger("vllm.lola")

# Pairs of a head of the small layer, and of one that is updated after every token, which the
# portable back end does token by token.
MOST_PAIRS, MOST_PAIRS_PER_TOKEN = 80, 16
# Differences that rounding explains, over the largest number of the same head: of answers and
# pairs, by the dtype of keys and values, and of what is float32 in every page.
ALLOWED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
ALLOWED_FLOAT32 = 2e-3
ALLOWED_INT8 = 2e-2  # a step of the rounding, where a rotated key lies between two
PORTABLE = Backend("torch", portable.decode, portable.prefill)
NULL, LIVE, FRESH, OTHER = range(4)  # pages; the first and the last must not be touched
SEEDS = (0, 1)


class Line(NamedTuple):
    """A line of the table: a step, and where the back end differs most in it.

    Attributes:
        step: what was done. part: what differs, or the error that the step ended in. head: the KV
            head; -1 where it is none. difference: relative to the head's largest number; infinite
            where there is none. allowed: what rounding explains.
    """

    step: str
    part: str
    head: int
    difference: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether rounding explains it."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        where = self.part if self.head < 0 else f"{self.part} of KV head {self.head}"
        if self.difference == float("inf"):
            return f"{self.step}: {where}"
        return f"{self.step}: {where} differs by {self.difference:.1e} (allowed {self.allowed:.0e})"


def serving_backend(backend: Backend, layers: Sequence[LayerState]) -> Backend:
    """The back end that will serve: the first that compiles for all layers and passes.

    Args:
        backend: the chosen one. layers: of one model on one rank; one of them is checked.
    """
    device = layers[0].pages.device
    dtype = layers[0].layout.pages[0].kv_dtype
    layer = max(layers, key=lambda layer: len(set(layer.layout.sizes)))
    while True:
        faults = _faults_of(backend, layers, layer)
        if not faults:
            return backend
        other = next_backend(backend, device.type, dtype)
        logger.warning(
            "LoLA ops %s failed their self-check on %s and are not used, %s serves instead. Please "
            "report this with the output of 'lola-vllm doctor'. %s",
            backend.name,
            device_name(device),
            other.name,
            "; ".join(map(str, faults)),
        )
        backend = other


def _faults_of(backend: Backend, layers: Sequence[LayerState], layer: LayerState) -> list[Line]:
    """What a back end does wrong; nothing for the portable one, with which it is compared."""
    try:
        if backend.warm_up is not None:
            for one in layers:
                backend.warm_up(one)
    except Exception as error:  # of compilers and drivers: any kind
        return [_failed("compilation", error)]
    return [line for line in examine(backend, layer) if not line.ok]


def examine(backend: Backend, layer: LayerState) -> list[Line]:
    """A line for each step. A fault counts if it comes with other numbers too: the choice between
    two pairs of almost the same score is no fault.

    Args:
        layer: of the model; its pages are not touched.
    """
    if backend.decode is portable.decode and backend.prefill is portable.prefill:
        return []
    for seed in SEEDS:
        lines = check(backend, layer, seed)
        if all(line.ok for line in lines):
            break
    return lines


def check(backend: Backend, layer: LayerState, seed: int = 0) -> list[Line]:
    """One run of `examine`."""
    problem = _Problem.like(layer, seed)
    expected, found = problem.state(), problem.state()
    lines = []
    for step in problem.steps():
        truth = step.run(PORTABLE, expected)
        try:
            answers = step.run(backend, found)
            if found.pages.is_cuda:
                torch.cuda.synchronize(found.pages.device)
        except Exception as error:  # of compilers and drivers: any kind
            lines.append(_failed(step.name, error))
            break  # a device that failed may answer nothing more
        line = max(
            _compare(problem, expected, found, truth, answers, step.held),
            key=lambda line: line.difference / line.allowed,
        )
        lines.append(line._replace(step=step.name))
        if not line.ok:  # the next step is judged by itself
            found.pages.copy_(expected.pages)
    return lines


def _failed(step: str, error: Exception) -> Line:
    text = next(iter(str(error).strip().splitlines()), "")
    return Line(step, f"{type(error).__name__}: {text}", -1, float("inf"), 0.0)


def example_layer(device: torch.device, dtype: torch.dtype) -> LayerState:
    """A layer of three KV heads like one of the demo model: what is checked where there is none."""
    config = LolaConfig(
        window_size=64,
        sparse_cache_size=((700, 0, 90),),
        hidden_state=((True, True, False),),
        update_interval=16,
        sink_size=4,
        sparse_dtype="int8",
        context_shift=512,
    )
    Hq, Hkv, d, F = 9, 3, 64, 64
    layout = LayerLayout.from_config(config, Hkv, Hkv, d, F, dtype, importance=True)
    wide = torch.promote_types(dtype, torch.float32)
    angles = torch.arange(d // 2, device=device, dtype=wide)
    rotation = KeyRotation(ShiftSchedule(2048, 512, fold_rotation=2), angles.cos(), angles.sin())
    weights = LolaWeights.prepare(
        torch.zeros(Hq, d, F, device=device),
        torch.zeros(Hkv, d, F, device=device),
        torch.zeros(Hq, device=device),
        config.mixing,
        Hkv,
        rotation=rotation,
    )
    pages = torch.empty(1, layout.page_bytes, dtype=torch.uint8, device=device)
    return LayerState.bind(weights, layout, pages)


def examine_all(device: torch.device, dtype: torch.dtype) -> dict[str, list[Line]]:
    """A table for each back end that this machine has, by its name.

    Args:
        dtype: of keys and values.
    """
    layer = example_layer(device, dtype)
    return {
        backend.name: examine(backend, layer)
        for backend in backends(device.type, dtype)
        if backend.decode is not portable.decode
    }


def device_name(device: torch.device) -> str:
    """The device's name, as its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"


# --- the small layer and its text ---


class _Step(NamedTuple):
    """run: of a back end on a state; gives answers, or None. held: tokens of each page after it."""

    name: str
    run: Callable[..., Tensor | None]
    held: dict[int, int]


@dataclass(frozen=True)
class _Problem:
    """q: `[T, Hq, d]`, k, v: `[T, Hkv, d]`. live: tokens that fill every cache, after which a
    context shift is due where there is any."""

    weights: LolaWeights
    layout: LayerLayout
    q: Tensor
    k: Tensor
    v: Tensor
    live: int

    @classmethod
    def like(cls, layer: LayerState, seed: int) -> _Problem:
        """A small layer of the layout of another, on its device."""
        layout = LayerLayout(tuple(map(_trimmed, layer.layout.pages, range(len(layer.groups)))))
        page, device = layout.pages[0], layer.pages.device
        C, own = page.update_interval, layer.weights
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        rotation, live = own.rotation, page.sink_size + page.window_size + 2 * C
        live += max(x.sparse_cache_size for x in layout.pages)
        live += -live % C
        if rotation is not None:
            interval = -(-32 // C) * C
            schedule = ShiftSchedule(
                4 * interval,
                interval,
                rotation.schedule.score_decay,
                rotation.schedule.score_decay_shifts,
                min(1, rotation.schedule.fold_rotation),
                interval,
            )
            rotation = replace(rotation, schedule=schedule)
            live = max(schedule.length + interval, -(-live // interval) * interval)
        Hq, Hkv, Hs = own.num_heads, layout.num_kv_heads, layout.num_state_heads
        d, F = page.head_dim, own.feature_map_q.shape[-1]
        weights = LolaWeights.prepare(
            (randn(Hq, d, F) / d**0.5).to(own.feature_map_q.dtype),
            (randn(Hs, d, F) / d**0.5).to(own.feature_map_q.dtype),
            randn(Hq).to(own.gates.dtype),
            "lolcats" if own.subtract_max else "lola",
            Hkv,
            (randn(Hkv, importance_size(d)) * 0.1).to(own.gates.dtype)
            if len(own.importance)
            else None,
            rotation,
            randn(Hq) if own.has_sinks else None,
        )
        T = live + _after(live, C) + 3
        q, k, v = (randn(T, heads, d).to(page.kv_dtype) for heads in (Hq, Hkv, Hkv))
        return cls(weights, layout, q, k, v, live)

    def state(self) -> LayerState:
        """The layer with pages that no number was written to."""
        pages = torch.full(
            (OTHER + 1, self.layout.page_bytes), 0xFF, dtype=torch.uint8, device=self.q.device
        )
        return LayerState.bind(self.weights, self.layout, pages)

    def steps(self) -> Iterable[_Step]:
        """The live page's text from the start, with a fresh page and padding beside it later."""
        page, schedule = self.layout.pages[0], self.weights.rotation
        n, C = self.live, page.update_interval
        fresh = page.sink_size + page.window_size + C + 3
        yield _Step("prefill", self._prefill([LIVE], [0], [n]), {LIVE: n})
        if schedule is not None:

            def shift(ops: Backend, state: LayerState) -> None:
                live = torch.tensor([LIVE], device=state.pages.device)
                context_shift.shift_due([state], live, torch.tensor([n]), ops.shift)

            yield _Step("context shift", shift, {LIVE: n})
        yield _Step("decode", self._decode([LIVE], [n]), {LIVE: n + 1})
        more = _after(n, C)
        yield _Step(
            "prefill of several",
            self._prefill([LIVE, NULL, FRESH], [n + 1, 0, 0], [more, 2, fresh]),
            {LIVE: n + 1 + more, FRESH: fresh},
        )
        n += 1 + more
        yield _Step(
            "update",
            self._decode([LIVE, NULL, FRESH], [n, 0, fresh]),
            {LIVE: n + 1, FRESH: fresh + 1},
        )
        yield _Step("decode after it", self._decode([LIVE], [n + 1]), {LIVE: n + 2})

    def _decode(self, pages: list[int], held: list[int]) -> Callable[..., Tensor]:
        def run(ops: Backend, state: LayerState) -> Tensor:
            q, k, v = (x[held] for x in (self.q, self.k, self.v))
            batch = DecodeBatch(
                *(
                    torch.tensor(x, dtype=torch.int32, device=q.device)
                    for x in (pages, [n + 1 for n in held])
                )
            )
            out = torch.full_like(q, torch.nan)
            context_shift.shift_due([state], batch.state_indices, torch.tensor(held), ops.shift)
            ops.decode(state, q, k, v, batch, out)
            return out

        return run

    def _prefill(
        self, pages: list[int], held: list[int], counts: list[int]
    ) -> Callable[..., Tensor]:
        def run(ops: Backend, state: LayerState) -> Tensor:
            spans = [slice(a, a + n) for a, n in zip(held, counts, strict=True)]
            q, k, v = (torch.cat([x[span] for span in spans]) for x in (self.q, self.k, self.v))
            batch = PrefillBatch(
                torch.tensor(pages, dtype=torch.int32, device=q.device),
                torch.tensor([0, *counts]).cumsum(0),
                torch.tensor(held),
            )
            out = torch.full_like(q, torch.nan)
            segments = context_shift.split_prefill(state.schedule, batch)
            context_shift.prefill(ops.prefill, state, q, k, v, segments, out, shift=ops.shift)
            return out

        return run


def _trimmed(page: StateLayout, index: int) -> StateLayout:
    most = MOST_PAIRS_PER_TOKEN if page.update_interval == 1 else MOST_PAIRS
    size = min(page.sparse_cache_size, most + index % 8)  # heads that differ go on to differ
    return replace(page, sparse_cache_size=size, recent_size=min(page.recent_size, size // 2))


def _after(live: int, interval: int) -> int:
    """Tokens of the second prompt: over an update, to one before the next."""
    return interval + 1 + -(live + 1 + interval + 1 + 1) % interval


# --- the comparison ---


def _compare(
    problem: _Problem,
    expected: LayerState,
    found: LayerState,
    truth: Tensor | None,
    answers: Tensor | None,
    held: dict[int, int],
) -> Iterable[Line]:
    allowed = ALLOWED[problem.k.dtype]
    if truth is not None and answers is not None:
        x, y = (x.unflatten(1, (problem.k.shape[1], -1)).transpose(0, 1) for x in (truth, answers))
        yield _largest("answer", x, y, allowed)
    first = 0
    for theirs, ours in zip(expected.groups, found.groups, strict=True):
        for page, n in held.items():
            parts = zip(_parts(theirs.views, theirs.layout, page, n),
                        _parts(ours.views, ours.layout, page, n), strict=True)  # fmt: skip
            for (name, x, limit), (_, y, _) in parts:
                x, y = (z.unflatten(0, (theirs.layout.num_kv_heads, -1)) for z in (x, y))
                yield _largest(name, x, y, limit or allowed, first)
        first += theirs.layout.num_kv_heads
    for page in (NULL, OTHER):
        touched = not torch.equal(expected.pages[page], found.pages[page])
        yield Line("", "another page", -1, float("inf") if touched else 0.0, 1.0)


def _parts(
    views: StateViews, page: StateLayout, index: int, n: int
) -> Iterable[tuple[str, Tensor, float | None]]:
    """What is valid of a page of n tokens: name, `[heads, ...]`, and by how much it may differ
    where not as answers may."""
    count = torch.tensor(n)
    sparse = int(page.num_sparse(count))
    if sparse:
        positions, order = views.positions[index, :, :sparse].sort(-1)
        yield "choice of pairs", positions, 1e-9

        def entries(x: Tensor) -> Tensor:
            x = x[index, :, :sparse]
            return x.gather(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand_as(x))

        for name, x, scale in (
            ("sparse keys", views.sparse_k, views.sparse_k_scale),
            ("sparse values", views.sparse_v, views.sparse_v_scale),
        ):
            if page.int8_pairs:
                rows = Int8Rows(entries(x), entries(scale)).to(torch.float32)
                yield name, rows, ALLOWED_INT8
            else:
                yield name, entries(x), None
        if page.has_score_weights:
            yield "weights of scores", entries(views.score_weights), ALLOWED_FLOAT32
    window = torch.cat(
        [torch.arange(min(n, page.sink_size)), torch.arange(int(page.window_start(count)), n)]
    )
    rows = page.row(window).to(views.exact_k.device)
    yield "keys of the window", views.exact_k[index, :, rows], None
    yield "values of the window", views.exact_v[index, :, rows], None
    if int(page.num_folded(count)):
        yield "H", views.H[index], ALLOWED_FLOAT32
        yield "s", views.s[index], ALLOWED_FLOAT32


def _largest(part: str, expected: Tensor, found: Tensor, allowed: float, first: int = 0) -> Line:
    """The largest of `[KV heads, ...]`, the first of which has the number `first`."""
    if not expected.numel():
        return Line("", part, -1, 0.0, allowed)
    x, y = (z.flatten(1).double() for z in (expected, found))
    difference = (x - y).abs().amax(1) / x.abs().amax(1).clamp(min=1e-30)
    difference = torch.nan_to_num(difference, nan=torch.inf)
    head = int(difference.argmax())
    return Line("", part, first + head, float(difference[head]), allowed)
