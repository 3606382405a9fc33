"""Launches against the host code that starts them, and how costs grow."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch

from lola_vllm.config import LolaConfig
from lola_vllm.gpu_cost import cuda
from lola_vllm.gpu_cost.gpus import GPUS
from lola_vllm.gpu_cost.steps import (
    ALL_HEADS,
    DECODE_DESIGNS,
    LOOP,
    PREFILL_DESIGNS,
    SPREAD,
    STOCK,
    TODAY_CUDA,
    TODAY_TRITON,
    Model,
    attend_tile,
    attends_apart,
    chunk_launches,
    decode,
    prefill,
    triton_launches,
)
from lola_vllm.gpu_cost.work import chunks_of
from lola_vllm.ops import DecodeBatch, PrefillBatch
from lola_vllm.state import LayerLayout, SequenceLayout
from tests.support import layers
from tests.support.documented import ROOT

H100 = GPUS["h100"]


def model(
    sizes: object = 128, num_layers: int = 4, interval: int = 16, recent: object = 0
) -> Model:
    config = LolaConfig(
        sparse_cache_size=sizes, recent_size=recent, update_interval=interval, sink_size=4
    )
    layer = LayerLayout.from_config(config, 2, 2, 64, 64, torch.bfloat16)
    sequence = SequenceLayout((layer,) * num_layers)
    return Model(sequence, 4, 4 * 10**6, 10**6, 2, None)


class Started:
    """In place of a kernel: counts its launches and does nothing."""

    count = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.start

    def start(self, *args: object, **kwargs: object) -> None:
        self.count += 1


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    pytest.importorskip("triton")
    from lola_vllm.kernels import attend, splits, update
    from lola_vllm.kernels import decode as decode_kernels
    from lola_vllm.kernels import prefill as prefill_kernels

    kernel = Started()
    for module, names in {
        decode_kernels: ("decode_kernel",),
        prefill_kernels: ("prefill_kernel", "attend_kernel"),
        update: ("score_kernel", "fold_kernel"),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, kernel)
    for module in (attend, splits, update):
        monkeypatch.setattr(module, "num_processors", lambda device: H100.processors)
    return kernel


@pytest.mark.parametrize("kind", ["as the demo model", "every token", "recent pairs"])
@pytest.mark.parametrize("rows", [1, 200])
def test_launches_of_a_step_are_those_of_the_triton_host_code(
    started: Started, kind: str, rows: int
):
    from lola_vllm.kernels import backend

    problem, _ = layers.layer(kind)
    state = layers.bind(problem)
    q, k, v = (x[:1].repeat(rows, 1, 1) for x in problem.tokens(0, 1))
    batch = DecodeBatch(torch.ones(rows).int(), torch.full((rows,), 80).int())
    backend.decode(state, q, k, v, batch, torch.empty_like(q))
    assert started.count == triton_launches(state.layout)


@pytest.mark.parametrize("kind", ["as the demo model", "every token", "recent pairs"])
@pytest.mark.parametrize("rows, tokens", [(1, 5), (1, 90), (43, 90), (44, 90)])
def test_a_prompt_is_one_launch_of_the_triton_host_code_and_two_of_few_rows(
    started: Started, kind: str, rows: int, tokens: int
):
    """For all heads and chunks; and one more where contexts shift between its segments."""
    from lola_vllm.kernels import backend

    problem, _ = layers.layer(kind)
    state = layers.bind(problem)
    q, k, v = (x.repeat(rows, 1, 1) for x in problem.tokens(0, tokens))
    starts = torch.arange(rows + 1) * tokens
    batch = PrefillBatch(torch.ones(rows).int(), starts, torch.zeros(rows, dtype=torch.long))
    backend.prefill(state, q, k, v, batch, torch.empty_like(q))
    apart = attends_apart(state.layout, rows, tokens, H100)
    assert apart == (rows < 44 and tokens > 5)  # three KV heads, 132 processors
    assert started.count == 1 + apart


def test_launches_of_a_step_are_those_of_the_cuda_host_code():
    """`run` of lola.cu; tests/ops/conformance/test_cuda.py counts them."""
    source = (ROOT / "csrc/cuda/lola.cu").read_text()
    (body,) = re.findall(r"^void run\(.*?^}", source, re.MULTILINE | re.DOTALL)
    started = re.findall(r"launch_\w+", body)
    assert started == [
        "launch_features", "launch_decode", "launch_update", "launch_update_per_token"
    ]  # fmt: skip
    for interval in (64, 1):
        (layer,) = set(model(interval=interval).sequence.layers)
        assert cuda.decode_launches(layer) == 3


def test_constants_are_those_of_the_cuda_host_code():
    source = (ROOT / "csrc/cuda/lola.cu").read_text() + (ROOT / "csrc/cuda/launch.cuh").read_text()
    for name in ("BLOCKS_PER_PROCESSOR", "SCORE_BATCH", "MAX_SCORE_BLOCKS"):
        there = "k" + name.title().replace("_", "")
        (value,) = re.findall(rf"constexpr int(?:64_t)? {there} = (\d+);", source)
        assert int(value) == getattr(cuda, name)


def test_groups_share_the_launches_of_today():
    equal, apart = model(), model((((100, 128)),) * 4)
    assert (equal.groups, apart.groups) == (4, 8)
    for design in (TODAY_CUDA, TODAY_TRITON):
        few, many = (decode(m, H100, 1, 4096, design).host_launches for m in (equal, apart))
        assert many == few == 4 * 3
    assert decode(apart, H100, 1, 4096, ALL_HEADS).launches == 4 * (8 + 3) + 3
    around = 4 * 8 + 3
    for m in (equal, apart):
        assert prefill(m, H100, 1, 2048, TODAY_TRITON).launches == around + 8
        assert prefill(m, H100, 200, 2048, TODAY_TRITON).launches == around + 4
    (page,) = equal.sequence.layers[0].pages
    chunks = chunk_launches(page, *chunks_of(page, 2048))
    assert prefill(equal, H100, 1, 2048, ALL_HEADS).launches == around + 4 * chunks
    assert prefill(apart, H100, 1, 2048, LOOP).launches == around + 4
    assert prefill(apart, H100, 1, 2048, SPREAD).launches == around + 8


def test_weights_and_full_kv_by_hand():
    parts = {part.name: part for part in decode(model(), H100, 8, 1000, STOCK).parts}
    assert (parts["weights"].bytes, parts["weights"].flops) == (8e6, 2 * 8 * 4e6)
    assert (parts["LM head"].bytes, parts["LM head"].flops) == (2e6, 2 * 8 * 1e6)
    # four layers, two KV heads of 64, keys and values of two bytes; four query heads
    assert parts["full KV"].bytes == 8 * 1000 * 4 * 2 * 64 * 2 * 2
    assert parts["full KV"].flops == 8 * 1000 * 4 * 4 * (4 * 64)
    parts = {part.name: part for part in prefill(model(), H100, 2, 100, STOCK).parts}
    assert parts["weights"].flops == 2 * 2 * 100 * 4e6 and parts["LM head"].flops == 2 * 2 * 1e6
    assert parts["full KV"].flops == 2 * 4 * 4 * (4 * 64) * 100 * 101 / 2


@pytest.mark.parametrize("design", DECODE_DESIGNS)
def test_more_sequences_take_longer(design: str):
    times = [decode(model(), H100, batch, 4096, design).seconds(H100) for batch in (300, 600, 1200)]
    assert times[0] < times[1] < times[2]


def test_only_stock_grows_with_the_context():
    for design in DECODE_DESIGNS:
        near, far = (decode(model(), H100, 8, n, design).seconds(H100) for n in (4096, 65536))
        assert far > near if design == STOCK else far == near


@pytest.mark.parametrize("design", PREFILL_DESIGNS)
def test_longer_prompts_take_longer(design: str):
    times = [prefill(model(), H100, 1, n, design).seconds(H100) for n in (512, 2048, 8192)]
    assert times[0] < times[1] < times[2]


def test_more_pairs_cost_more_and_a_faster_gpu_less():
    large = model(2048)
    for design in (TODAY_CUDA, TODAY_TRITON, ALL_HEADS):
        few, many = (decode(m, H100, 64, 8192, design).seconds(H100) for m in (model(), large))
        assert many > few
    slow = dataclasses.replace(H100, bytes_per_s=H100.bytes_per_s / 2)
    step = decode(large, H100, 64, 8192, ALL_HEADS)
    assert step.seconds(slow) > 1.5 * (step.seconds(H100) - step.launch_seconds)


def test_sequential_designs_wait_for_the_largest_head():
    """One row leaves most processors idle; as many rows as there are processors use them."""
    apart = model((((16, 4000)),) * 4)
    one, many = (prefill(apart, H100, rows, 8192, LOOP) for rows in (1, 16))
    scores = [
        next(p for p in cost.parts if p.name == "scores").seconds(H100) for cost in (one, many)
    ]
    assert scores[0] == scores[1]
    spread = prefill(apart, H100, 1, 8192, SPREAD)
    faster = next(p for p in spread.parts if p.name == "scores").seconds(H100)
    assert scores[0] / 8 < faster < scores[0]
    attends = prefill(apart, H100, 1, 8192, TODAY_TRITON)
    for name in ("sparse K/V", "H and s", "window and sinks"):
        waits, free = (
            next(p for p in cost.parts if p.name == name).seconds(H100) for cost in (one, attends)
        )
        assert free < waits


def test_decode_scores_recent_pairs_today_and_not_in_the_other_designs():
    recent = model(2048, recent=1500)
    today, better = (decode(recent, H100, 64, 8192, d) for d in (TODAY_TRITON, ALL_HEADS))
    flops = [next(p for p in cost.parts if p.name == "scores").flops for cost in (today, better)]
    assert flops[1] / flops[0] == pytest.approx((2048 + 16 - 1500) / (2048 + 16))


def test_no_prompt_scores_recent_pairs():
    flops = {
        recent: [
            next(p for p in prefill(model(2048, recent=recent), H100, 1, 8192, design).parts
                 if p.name == "scores").flops
            for design in (TODAY_TRITON, LOOP)
        ]
        for recent in (0, 1500)
    }  # fmt: skip
    assert flops[0][0] == flops[0][1]
    assert flops[1500] == pytest.approx([flops[0][0] * (2064 - 1500) / 2064] * 2)


@pytest.mark.parametrize("d", [16, 64, 128])
@pytest.mark.parametrize("interval", [1, 16, 17, 64, 100])
@pytest.mark.parametrize("heads, states", [(4, 4), (6, 2), (12, 2)])
def test_tiles_of_a_prompt_are_those_of_the_kernel(d: int, interval: int, heads: int, states: int):
    pytest.importorskip("triton")
    from lola_vllm.kernels.prefill import tile_of

    config = LolaConfig(update_interval=interval)
    layer = LayerLayout.from_config(config, 2, states, d, 32, torch.bfloat16)
    tokens, own = attend_tile(layer.pages[0], heads)
    assert tile_of(layer, heads) == (tokens * own, own)


def test_heads_that_share_a_tile_read_pairs_once():
    """Two query heads a KV head, and chunks of 16 tokens: one tile. As many rows as fill the GPU,
    which are attended within the loop."""
    one = dataclasses.replace(H100, processors=2)
    today, loop = (prefill(model(2048), one, 1, 8192, design) for design in (TODAY_TRITON, LOOP))
    assert today.seconds(one) == loop.seconds(one)
    apart = model(2048, interval=256)
    today, loop = (prefill(apart, one, 1, 8192, design) for design in (TODAY_TRITON, LOOP))
    assert today.seconds(one) >= loop.seconds(one)
    assert today.bytes == loop.bytes


def test_a_float32_model_uses_no_tensor_cores():
    config = LolaConfig(sparse_cache_size=128)
    layer = LayerLayout.from_config(config, 2, 2, 64, 64, torch.float32)
    wide = Model(SequenceLayout((layer,)), 4, 10**6, 10**6, 4, None)
    for design in DECODE_DESIGNS:
        assert {part.unit for part in decode(wide, H100, 8, 4096, design).parts} == {"fp32"}
