"""A decode step and a prompt of a model: parts, launches, and what must be done in order.

Launches are those of the host code, which starts them for a layer: `csrc/cuda/lola.cu` (decode,
`cuda.py`), `kernels/decode.py`, `kernels/update.py` and `kernels/prefill.py`. The other designs are
not built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lola_vllm.config import LolaLlamaConfig
from lola_vllm.gpu_cost import cuda
from lola_vllm.gpu_cost.gpus import Chain, Cost, Gpu, Part, Unit
from lola_vllm.gpu_cost.work import (
    FOLDS,
    SCORES,
    SPARSE,
    STATE,
    TOKENS,
    WINDOW,
    Work,
    attended,
    chunks_of,
    map_bytes,
    shift_work,
    state_bytes,
    updated,
)
from lola_vllm.ops.shift_schedule import ShiftSchedule
from lola_vllm.state import LayerLayout, SequenceLayout, StateLayout

# Designs.
STOCK, TODAY_CUDA, TODAY_TRITON, ALL_HEADS = "stock", "today, CUDA", "today, Triton", "all heads"
LOOP, SPREAD = "loop", "spread, attend"
DECODE_DESIGNS = (STOCK, TODAY_CUDA, TODAY_TRITON, ALL_HEADS)
PREFILL_DESIGNS = (STOCK, TODAY_TRITON, ALL_HEADS, LOOP, SPREAD)

WEIGHTS, HEAD, FULL_KV, SELECT, SHIFT = (
    "weights",
    "LM head",
    "full KV",
    "selection",
    "context shift",
)
# vLLM's Llama without attention: two norms with their additions, four products of matrices, RoPE,
# the activation; around the layers the embedding, the last norm and the LM head.
LAYER_LAUNCHES, MODEL_LAUNCHES = 8, 3
STOCK_LAUNCHES = 2  # keys and values into the cache, flash attention; one more joins splits
GOAL_DECODE_LAUNCHES = 3  # attention, scores, selection with folds
SHIFT_LAUNCHES = 1  # `kernels/shift.py`
STEP_TOKENS = 8192  # of prompts in a step of vLLM, which reads the weights once
MAX_KEPT_BYTES = 2**28  # of a layer, where the attention of a prompt is a launch of its own
SPREAD_BLOCKS = 8  # the largest cluster of blocks that runs on every GPU with clusters
ATTEND_ROWS = 32  # queries of a block of a launch per chunk

# Which units a design's parts use. The order of scores decides, so plain TF32 will not do there.
TENSOR: dict[str, Unit] = {STATE: "tf32", SCORES: "tf32x3", FOLDS: "tf32x3", SELECT: "fp32"}
VECTOR: dict[str, Unit] = dict.fromkeys((WINDOW, SPARSE, STATE, SCORES, FOLDS, SELECT), "fp32")


@dataclass(frozen=True)
class Model:
    """What is counted of a model.

    Attributes:
        sequence: its state. num_heads: Hq. layer_weights: numbers in the matrices of all layers.
        head_weights: those of the LM head. weight_bytes: of a number.
        schedule: of its context shifts.
    """

    sequence: SequenceLayout
    num_heads: int
    layer_weights: int
    head_weights: int
    weight_bytes: int
    schedule: ShiftSchedule | None

    @classmethod
    def of(cls, config: LolaLlamaConfig, sequence: SequenceLayout) -> Model:
        """Of a config, with all of its heads; biases and norms are left out."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        kv_heads, d = config.num_key_value_heads, int(config.head_dim or 0)
        assert kv_heads is not None  # LlamaConfig fills it in
        attention = hidden * d * (2 * heads + 2 * kv_heads)
        layer = attention + 3 * hidden * config.intermediate_size
        item = sequence.layouts[0].kv_dtype.itemsize
        schedule = ShiftSchedule.of(config)
        layers = config.num_hidden_layers
        return cls(sequence, heads, layers * layer, config.vocab_size * hidden, item, schedule)

    @property
    def bytes(self) -> int:
        """Of all weights, if the LM head is tied."""
        return (self.layer_weights + self.head_weights) * self.weight_bytes

    @property
    def groups(self) -> int:
        """Head groups of all layers."""
        return len(self.sequence.layouts)

    def heads_of(self, layer: LayerLayout) -> int:
        """Query heads of each of its pages."""
        return self.num_heads // len(layer.pages)


class _Sums:
    """Bytes, flops and chain by part."""

    def __init__(self) -> None:
        self.work: dict[str, tuple[float, float]] = {}
        self.chain: dict[str, Chain] = {}

    def add(self, name: str, nbytes: float, flops: float = 0.0) -> None:
        old = self.work.get(name, (0.0, 0.0))
        self.work[name] = (old[0] + nbytes, old[1] + flops)

    def follow(self, name: str, flops: float, nbytes: float = 0.0, steps: float = 0.0) -> None:
        """More that comes after what is in the chain of a part."""
        old = self.chain.get(name, Chain())
        self.chain[name] = Chain(old.flops + flops, old.bytes + nbytes, old.steps + steps)

    def parts(self, units: Mapping[str, Unit], wide: bool) -> tuple[Part, ...]:
        """wide: the model is float32, and tensor cores do not serve it."""
        return tuple(
            Part(
                name, *work, "fp32" if wide else units.get(name, "bf16"),
                self.chain.get(name, Chain()),
            )
            for name, work in self.work.items()
        )  # fmt: skip


def decode(model: Model, gpu: Gpu, batch: int, context: int, design: str) -> Cost:
    """A step of `batch` sequences of `context` tokens: the mean over an update interval.

    Args:
        design: one of `DECODE_DESIGNS`. CUDA graphs hold all but LoLA's attention, as by default,
            and all of "stock" and "all heads".
    """
    sums, layers = _Sums(), len(model.sequence.layers)
    _weights(sums, model, batch, batch, steps=1)
    graph, host = float(LAYER_LAUNCHES * layers + MODEL_LAUNCHES), 0.0
    first = model.sequence.layouts[0]
    if design == STOCK:
        sums.add(FULL_KV, *_full_kv(model, batch, context))
        splits = batch * model.sequence.layers[0].num_kv_heads < gpu.processors
        graph += layers * (STOCK_LAUNCHES + splits)
        return Cost(design, sums.parts({}, first.kv_dtype == torch.float32), graph, host)

    C = first.update_interval
    starts = torch.arange(context - 1, context - 1 + C)
    for layer, count in Counter(model.sequence.layers).items():
        heads, some_due = model.heads_of(layer), min(1.0, batch / C) * count
        folds = []
        for page in layer.pages:
            works = attended(page, heads, starts, torch.ones_like(starts))
            works |= updated(page, starts + 1, skip_recent=design == ALL_HEADS)
            for name, work in works.items():
                sums.add(name, *(count * batch * float(x.mean()) for x in work))
            sums.add(STATE, count * map_bytes(page, heads))
            # A step is as late as its longest update: one block for a row and set selects and
            # folds.
            folds.append([some_due * float(x.max()) / page.num_sparse_heads for x in works[FOLDS]])
        if design == TODAY_TRITON:
            nbytes, flops = (max(numbers) for numbers in zip(*folds, strict=True))
            sums.follow(FOLDS, flops, nbytes)
            host += count * triton_launches(layer)
    if design == ALL_HEADS:
        graph += layers * GOAL_DECODE_LAUNCHES
    if design == TODAY_CUDA:
        host += _updates_of_cuda(sums, model, batch, context, gpu)
    if model.schedule is not None and context >= model.schedule.length:
        times = batch / model.schedule.interval
        _shift(sums, model, times)
        host += min(1.0, times) * SHIFT_LAUNCHES  # for all layers
    units = VECTOR if design == TODAY_CUDA else TENSOR
    return Cost(design, sums.parts(units, first.kv_dtype == torch.float32), graph, host)


def prefill(model: Model, gpu: Gpu, rows: int, tokens: int, design: str) -> Cost:
    """Prompts of `tokens` tokens from empty states, all in one call; the host starts all kernels.

    Memory is read once where what a launch comes back to fits L2, and else once for each chunk.

    Args:
        design: one of `PREFILL_DESIGNS`. "all heads": three launches for each chunk. "loop": a
            block per row and KV head does all of its chunks in one launch. That of today reads
            pairs for each tile of queries; where rows are few (`attends_apart`) it computes scores,
            choices and folds alone, and a second launch attends, from copies of H at each chunk.
            "spread, attend": so in any case, and `SPREAD_BLOCKS` blocks share the scores of a row
            and KV head, and wait for each other once more a chunk.
    """
    sums, layers = _Sums(), len(model.sequence.layers)
    total = rows * tokens
    _weights(sums, model, total, rows, steps=-(-total // STEP_TOKENS))
    host = float(LAYER_LAUNCHES * layers + MODEL_LAUNCHES)
    wide = model.sequence.layouts[0].kv_dtype == torch.float32
    if design == STOCK:
        for layer in model.sequence.layers:
            d, item = layer.pages[0].head_dim, layer.pages[0].kv_dtype.itemsize
            moved = (2 * model.num_heads + 4 * layer.num_kv_heads) * d * item
            sums.add(TOKENS, total * moved)
            sums.add(FULL_KV, 0.0, rows * model.num_heads * 4.0 * d * tokens * (tokens + 1) / 2)
        return Cost(design, sums.parts({}, wide), 0.0, host + layers * STOCK_LAUNCHES)

    segments = 1
    if model.schedule is not None:
        segments = len(model.schedule.segment_lengths(0, tokens))
    for layer, count in Counter(model.sequence.layers).items():
        heads, chains = model.heads_of(layer), []
        few = design == TODAY_TRITON and attends_apart(layer, rows, tokens, gpu)
        apart = design == SPREAD or (few and segments == 1)
        for page in layer.pages:
            starts, lengths = chunks_of(page, tokens)
            works = attended(page, heads, starts, lengths)
            works |= updated(page, starts + lengths, skip_recent=True)
            for name, work in works.items():
                again = name == TOKENS or rows * layer.page_bytes > gpu.l2_bytes
                nbytes = work.bytes.sum() if again else work.bytes.max()
                sums.add(name, count * rows * float(nbytes), count * rows * float(work.flops.sum()))
            sums.add(STATE, count * map_bytes(page, heads))
            if apart:  # copies are written and read
                copies = 2.0 * count * rows * len(lengths)
                sums.add(STATE, copies * state_bytes(page))
                sums.add(SPARSE, copies * list_bytes(page))
            chains.append(_chain(page, heads, lengths, works, design, apart))
        if design == ALL_HEADS:
            host += count * max(
                chunk_launches(page, *chunks_of(page, tokens)) for page in layer.pages
            )
        else:
            # Today only sequences from their first token on are attended apart.
            host += count * (segments * 2 if design == SPREAD else segments + few)
        for name in chains[0]:
            parts = torch.stack([chain[name] for chain in chains])  # [pages, 3, chunks]
            # With a launch for each chunk, a chunk waits for the longest of its heads.
            longest = parts.amax(0).sum(1) if design == ALL_HEADS else parts.sum(2).amax(0)
            sums.follow(name, *(count * float(x) for x in longest))
    if segments > 1:
        _shift(sums, model, rows * (segments - 1))
        host += layers * (segments - 1) * SHIFT_LAUNCHES
    return Cost(design, sums.parts(TENSOR, wide), 0.0, host)


def _updates_of_cuda(sums: _Sums, model: Model, batch: int, context: int, gpu: Gpu) -> float:
    """Adds what one block of a row and set does in order, in the longest head of a layer: a part of
    the scores, the choice, the folds. Launches of all layers."""
    launches = 0.0
    for layer, count in Counter(model.sequence.layers).items():
        C = layer.pages[0].update_interval
        n, longest = torch.arange(context, context + C), dict.fromkeys((SCORES, FOLDS), (0.0, 0.0))
        chosen, some_due = 0.0, min(1.0, batch / C) * count
        for page in layer.pages:
            works, sets = updated(page, n, skip_recent=False), page.num_sparse_heads
            blocks = 1 if cuda.updates_per_token(page) else cuda.score_parts(layer, batch, gpu)
            for name, share in ((SCORES, sets * blocks), (FOLDS, sets)):
                nbytes, flops = (float(x.max()) / share for x in works[name])
                longest[name] = max(longest[name], (flops, nbytes))
            if not cuda.updates_per_token(page):
                pairs = min(page.sparse_cache_size, int(page.num_evicted(torch.tensor(context))))
                each = float(cuda.SELECT_PASSES * cuda.SELECT_INSTRUCTIONS * (pairs + C))
                sums.add(SELECT, 0.0, count * batch / C * sets * each)
                chosen = max(chosen, each)
        for name, (flops, nbytes) in longest.items():
            sums.follow(name, some_due * flops, some_due * nbytes)
        if chosen:
            sums.follow(SELECT, some_due * chosen)
        launches += count * cuda.decode_launches(layer)
    return launches


def triton_launches(layer: LayerLayout) -> int:
    """Kernels of a decode step of a layer in Triton: attention, scores where some set has entries,
    and folds, which join attention where it is split."""
    return 2 + any(layer.sizes)


def chunk_launches(page: StateLayout, starts: Tensor, lengths: Tensor) -> int:
    """Kernels of a prompt if they are started for each chunk: attention, and at an update scores,
    where a cache overflows, and folds."""
    n = starts + lengths
    due = page.update_due(n)
    scores = due & (page.num_evicted(n) > page.sparse_cache_size)
    return int(len(n) + due.sum() + (scores.sum() if page.sparse_cache_size else 0))


def _weights(sums: _Sums, model: Model, tokens: int, answers: int, steps: int) -> None:
    """steps: times that the weights are read."""
    nbytes = steps * model.weight_bytes
    sums.add(WEIGHTS, nbytes * model.layer_weights, 2.0 * tokens * model.layer_weights)
    sums.add(HEAD, nbytes * model.head_weights, 2.0 * answers * model.head_weights)


def _full_kv(model: Model, batch: int, context: int) -> tuple[float, float]:
    read = float(batch * context * model.sequence.full_kv_bytes_per_token)
    layers = model.sequence.layers
    flops = 4.0 * model.num_heads * layers[0].pages[0].head_dim * len(layers)
    return read, flops * batch * context


def _shift(sums: _Sums, model: Model, times: float) -> None:
    """Adds `times` context shifts of a sequence."""
    for page in model.sequence.layouts:
        nbytes, flops = shift_work(page)
        sums.add(SHIFT, times * nbytes, times * flops)


def attends_apart(layer: LayerLayout, rows: int, tokens: int, gpu: Gpu) -> bool:
    """As of `kernels/attend.py`: whether the attention of prompts is a launch of its own."""
    page = layer.pages[0]
    chunks, sizes = len(chunks_of(page, tokens)[0]), layer.sizes
    if chunks < 2 or rows * layer.num_kv_heads >= gpu.processors:
        return False
    state = layer.num_state_heads * 2 * page.feature_dim * (page.head_dim + 1)
    return rows * (chunks + 1) * 4 * (state + len(sizes) * max(sizes)) <= MAX_KEPT_BYTES


def list_bytes(page: StateLayout) -> int:
    """Of the positions that a chunk keeps of its sets, where they are full."""
    return 4 * page.num_sparse_heads * page.sparse_cache_size


def _chain(
    page: StateLayout,
    heads: int,
    lengths: Tensor,
    works: Mapping[str, Work],
    design: str,
    apart: bool,
) -> dict[str, Tensor]:
    """What a block does of a row's chunks: flops, bytes and steps, `[3, chunks]`, by part."""
    steps = torch.zeros(len(lengths), dtype=torch.float64)

    def share(names: Iterable[str], of_flops: Tensor | int, of_bytes: int) -> Tensor:
        flops = sum((works[name].flops for name in names), steps) / of_flops
        nbytes = sum((works[name].bytes for name in names), steps) / of_bytes
        return torch.stack([flops, nbytes, steps])

    kv = page.num_kv_heads
    chain = {FOLDS: share([FOLDS], page.num_sparse_heads, page.num_sparse_heads)}
    blocks = -(-lengths // ATTEND_ROWS)
    if design == ALL_HEADS:  # a block attends 32 queries of a head
        return chain | {name: share([name], heads * blocks, kv) for name in (WINDOW, SPARSE, STATE)}
    chain = {name: share([name], kv, kv) for name in (SCORES, FOLDS)}
    chain[FOLDS][2] = 1.0  # a step between chunks
    if design == SPREAD:
        chain[SCORES] /= SPREAD_BLOCKS
        chain[SCORES][2] = (works[SCORES].flops > 0).double()
    if apart:  # the loop copies positions, and writes H and s once more
        copied = state_bytes(page) * (works[FOLDS].flops > 0) + 2.0 * list_bytes(page)
        chain[FOLDS][1] += copied / page.num_sparse_heads
        return chain
    chain |= {name: share([name], kv, kv) for name in (WINDOW, SPARSE, STATE)}
    if design == TODAY_TRITON:  # which comes back to all of it for each tile of queries
        tokens, tile_heads = attend_tile(page, heads)
        tiles = -(-lengths // tokens) * -(-heads // page.num_state_heads // tile_heads)
        # Tiles whose heads share a set or a KV head, of several state heads, read the same pairs.
        chain[STATE][1] *= tiles
        chain[SPARSE][1] *= tiles * (page.num_state_heads // page.num_sparse_heads)
        chain[WINDOW][1] *= tiles * (page.num_state_heads // kv)
    return chain


def attend_tile(page: StateLayout, num_heads: int) -> tuple[int, int]:
    """Tokens, and query heads of a state head, that prefill attends at a time: as `tile_of` of
    `kernels/prefill.py`."""
    most = 32 if page.head_dim > 64 else 64
    tokens = min(most, max(16, _power_of_two(page.update_interval)))
    return tokens, min(most // tokens, _power_of_two(num_heads // page.num_state_heads))


def _power_of_two(x: int) -> int:
    """The least that is at least x."""
    return 1 << (x - 1).bit_length()
