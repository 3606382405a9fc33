"""What Triton's host code launches and what would be compiled for it, counted without a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import DecodeBatch, LayerState, LolaWeights, PrefillBatch
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import LayerLayout

pytest.importorskip("triton")

Hq, Hkv, d, F = 9, 3, 64, 32
# Entries of each KV head's set, layer by layer: with heads that differ, and that do not.
SMALL = ((100, 700, 30), (64, 64, 64), (0, 16, 16))
LARGE = ((3677, 12, 1001), (11731, 0, 257), (512, 512, 512))
MOST_COMPILATIONS = 24


@dataclass
class Launches:
    """In place of the GPU: the names of kernels that were launched, and each variant of them.

    A variant is what Triton compiles apart: constants, dtypes, and of numbers and addresses that
    are specialized whether they are 1 or divisible by 16.
    """

    names: list[str] = field(default_factory=list)
    variants: set[tuple[Any, ...]] = field(default_factory=set)

    def run(self, kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any):
        assert all(n > 0 for n in grid)
        bound = dict(zip((p.name for p in kernel.params), args, strict=False)) | options
        self.names.append(kernel.fn.__name__)
        own: list[Any] = [kernel.fn.__name__, options["num_warps"]]
        for p in kernel.params:
            value = bound[p.name]
            aligned = not (p.do_not_specialize or p.do_not_specialize_on_alignment)
            if p.is_constexpr:
                own.append(value)
            elif isinstance(value, Tensor):
                own.append((value.dtype, aligned and value.data_ptr() % 16 == 0))
            elif isinstance(value, float) or p.do_not_specialize:
                own.append(type(value))
            else:
                own.append((value == 1, aligned and value % 16 == 0))
        self.variants.add(tuple(own))


@pytest.fixture
def launches(monkeypatch) -> Launches:
    """For a GPU of 132 processors."""
    from triton.runtime.jit import JITFunction

    from lola_vllm.kernels import attend, splits, update

    found = Launches()
    monkeypatch.setattr(
        JITFunction, "run", lambda kernel, *args, **options: found.run(kernel, *args, **options)
    )
    for module in (attend, splits, update):
        monkeypatch.setattr(module, "num_processors", lambda device: 132)
    return found


def layers_of(sizes: Sequence[tuple[int, ...]], **fields: Any) -> list[LayerState]:
    """A model's layers, with their pages in one pool, as the plugin has them."""
    config = LolaConfig(**{"update_interval": 16, "sink_size": 4, **fields})
    layouts = []
    for own in sizes:
        size = own[0] if len(set(own)) == 1 else (own,)
        layer = config.model_copy(update={"sparse_cache_size": size})
        layouts.append(LayerLayout.from_config(layer, Hkv, Hkv, d, F, torch.bfloat16))
    sequence = SequenceLayout(tuple(layouts))
    pool = torch.zeros(2, sequence.row_bytes, dtype=torch.uint8)
    maps = torch.zeros(Hq, d, F), torch.zeros(Hkv, d, F)
    rotation = None
    if config.context_shift:
        rotation = KeyRotation(ShiftSchedule(1024, 256), torch.ones(d // 2), torch.zeros(d // 2))
    weights = LolaWeights.prepare(
        *maps, torch.zeros(Hq), config.mixing, Hkv, importance=None, rotation=rotation
    )
    return [
        LayerState.bind(weights, layout, pages)
        for layout, pages in zip(layouts, sequence.pages(pool), strict=True)
    ]


def tokens(count: int) -> tuple[Tensor, ...]:
    """q, k, v, slices of one projection, and out."""
    rows = torch.zeros(count, Hq + 2 * Hkv, d, dtype=torch.bfloat16)
    return *rows.split([Hq, Hkv, Hkv], 1), torch.zeros(count, Hq, d, dtype=torch.bfloat16)


def decode(layer: LayerState, rows: int) -> None:
    from lola_vllm.kernels import backend

    q, k, v, out = tokens(rows)
    batch = DecodeBatch(torch.ones(rows).int(), torch.full((rows,), 80).int())
    backend.decode(layer, q, k, v, batch, out)


def prefill(
    layer: LayerState, lengths: Sequence[int], before: int = 0, softmax: Any = None
) -> None:
    from lola_vllm.kernels import backend

    q, k, v, out = tokens(sum(lengths))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rows = len(lengths)
    batch = PrefillBatch(torch.ones(rows).int(), starts, torch.full((rows,), before))
    backend.prefill(layer, q, k, v, batch, out, softmax)


def served(layers: list[LayerState]) -> None:
    """Steps of few and of many sequences, and prompts."""
    for layer in layers:
        for rows in (1, 2, 8, 64, 300):
            decode(layer, rows)
        for lengths in ([2048], [1], [5, 0, 700, 33]):
            prefill(layer, lengths)


@pytest.mark.parametrize("fields", [{}, {"sparse_dtype": "int8"}, {"update_interval": 1}])
def test_models_of_different_sizes_compile_the_same_few_kernels(launches, fields):
    served(layers_of(SMALL, **fields))
    small, launches.variants = launches.variants, set()
    served(layers_of(LARGE, **fields))
    assert launches.variants == small
    assert len(small) <= MOST_COMPILATIONS


def test_requests_ask_for_no_variant_that_the_warm_up_did_not(launches, monkeypatch):
    from lola_vllm.kernels import warmup

    monkeypatch.setattr(warmup, "_compiled", set())
    layers = layers_of(SMALL)
    for layer in layers:
        warmup.warm_up(layer)
    compiled, launches.variants = launches.variants, set()
    served(layers)
    assert launches.variants <= compiled


STEPS = {
    "interval 16": {},
    "int8": {"sparse_dtype": "int8"},
    "interval 1": {"update_interval": 1},
    "interval 1, recent pairs of some heads": {"update_interval": 1, "recent_size": ((0, 9, 0),)},
}


@pytest.mark.parametrize("sizes", [SMALL, LARGE, ((0, 0, 0),)])
@pytest.mark.parametrize("fields", STEPS.values(), ids=STEPS)
def test_a_decode_step_is_three_launches_a_layer(launches, sizes, fields):
    """Also where its pairs are split among programs, as those of few rows are. Without sparse
    entries none is scored."""
    scores = ["score_kernel"] if any(map(sum, sizes)) else []
    for layer in layers_of(sizes, **fields):
        for rows in (1, 8, 300):
            launches.names.clear()
            decode(layer, rows)
            assert launches.names == ["decode_kernel", *scores, "fold_kernel"]


ONE = ["prefill_kernel"]
TWO = [*ONE, "attend_kernel"]


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
@pytest.mark.parametrize(
    ("lengths", "first", "later"),
    [
        *((many, ONE, ONE) for many in ([1], [48] * 200, [2048] * 44)),
        *((few, TWO, ONE) for few in ([2048], [2048] * 4, [9, 300])),
    ],
)
def test_a_prompt_is_one_launch_a_layer_and_of_few_rows_two(launches, sizes, lengths, first, later):
    """The second attends all chunks; it needs keys and values of the whole sequence."""
    for layer in layers_of(sizes):
        for before, names in ((0, first), (16, later)):
            launches.names.clear()
            prefill(layer, lengths, before)
            assert launches.names == names


@pytest.mark.parametrize(
    ("lengths", "before", "asked"), [([2048], 0, 0), ([2048] * 44, 0, 1), ([9, 300], 16, 1)]
)
def test_the_softmax_part_is_asked_where_it_would_be_in_the_loop(launches, lengths, before, asked):
    calls = []

    def softmax(layer, q, k, v, batch):
        calls.append(batch)
        return torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])

    (layer,) = layers_of(((512, 512, 512),))
    prefill(layer, lengths, before, softmax)
    assert len(calls) == asked
    assert launches.names == ["prefill_kernel"] + ["attend_kernel"] * (not asked)


def test_what_a_prompt_keeps_of_its_chunks_is_bounded(launches):
    """With an interval of 1 a prompt has as many chunks as tokens."""
    (layer,) = layers_of(((512, 512, 512),), update_interval=1)
    prefill(layer, [512])
    prefill(layer, [8192])
    assert launches.names == ["prefill_kernel", "attend_kernel", "prefill_kernel"]


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_a_context_shift_is_one_launch_for_all_layers(launches, sizes):
    from lola_vllm.kernels import shift

    shift._table_of.cache_clear()
    layers = layers_of(sizes, context_shift=256)
    for _ in range(2):
        launches.names.clear()
        shift.shift_layers(layers, torch.tensor([1]), torch.tensor([1024]))
        assert launches.names == ["shift_kernel"]
    assert shift._table_of.cache_info().misses == 1  # no copy of the table with each


def test_the_rows_of_a_step_are_copied_once_for_all_layers(launches):
    from lola_vllm.kernels.prefill import rows_on

    rows_on.cache_clear()
    for layer in layers_of(LARGE):
        prefill(layer, [9, 300])
    assert rows_on.cache_info().misses == 1
