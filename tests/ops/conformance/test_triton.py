"""What Triton's kernels promise besides: their plans, and what is compiled at start-up."""

import dataclasses

import pytest
import torch

from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import LayerState, PrefillBatch, context_shift, portable
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import LayerLayout
from tests.support import layers
from tests.support.backends import fewer, only
from tests.support.layers import BASE, SIZES
from tests.support.problem import STATE_INDEX, feed, make_problem
from tests.support.problem import decode as step

ETA = 10


def config_of(**fields):
    return LolaConfig(**{"window_size": ETA, **fields})


@only("triton-interpreted")
def test_splits_follow_the_shapes(backend, monkeypatch):
    from lola_vllm.kernels import splits
    from tools.compile_triton import llama_8b

    monkeypatch.setattr(splits, "num_processors", lambda device: 132)
    page, device = llama_8b(), torch.device("cpu")
    counts = [splits.choose_splits(page, rows, device) for rows in (1, 4, 16, 17, 512)]
    assert counts == [8, 8, 2, 1, 1]  # 640 pairs are 10 tiles; two programs per processor


@only("triton-interpreted")
def test_pieces_end_at_the_update_points(backend):
    from lola_vllm.kernels.chunks import plan_chunks

    layout = make_problem(1, config_of(update_interval=7, sink_size=2)).layout()
    start, context = torch.tensor([0, 30, 30, 31, 60]).numpy(), torch.tensor([0, 5, 27, 8]).numpy()
    token, position, length, row = plan_chunks(start, context, layout)
    # eta + sinks + 1 = 13, so 14 is the first point at which a pair leaves the window.
    assert list(zip(row, position, position + length, strict=True)) == [
        (0, 0, 14), (0, 14, 21), (0, 21, 28), (0, 28, 30), (2, 27, 28), (3, 8, 14), (3, 14, 21),
        (3, 21, 28), (3, 28, 35), (3, 35, 37),
    ]  # fmt: skip
    assert (token == start[row] + position - context[row]).all()


@only("triton-interpreted")
def test_the_longest_rows_start_first_and_empty_ones_never(backend):
    from lola_vllm.kernels.prefill import rows_on

    starts, contexts = torch.tensor([0, 3, 3, 8]), torch.tensor([5, 0, 9])
    device = torch.device("cpu")
    rows = rows_on(device, starts.numpy().tobytes(), contexts.numpy().tobytes())
    # First token, tokens before, tokens, row of the batch.
    assert rows.T.tolist() == [[3, 9, 5, 2], [0, 5, 3, 0]]


SHIFTS = {
    "sizes by head, int8": {"sparse_cache_size": (SIZES,), "sparse_dtype": "int8"},
    "partial rotary, int8": {"sparse_cache_size": 7, "sparse_dtype": "int8"},
    "every token": {"sparse_cache_size": (SIZES,), "update_interval": 1},
    "recent pairs": {"sparse_cache_size": (SIZES,), "recent_size": ((0, 0, 3),)},
    "shared sets": {"sparse_cache_size": 9, "sparse_sharing": "kv_head"},
}


@only("triton-interpreted")
@pytest.mark.parametrize("kind", SHIFTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@fewer("interpreted", dtype=[torch.float32])
def test_a_context_shift_of_all_layers_is_one_launch_and_that_of_torch(backend, kind, dtype):
    from lola_vllm.kernels import shift

    schedule = ShiftSchedule(64, 16, 1.0, 2, bucket_start=16)
    config = LolaConfig(**{**BASE, "context_shift": 16, **SHIFTS[kind]})
    problems = [
        make_problem(
            80, config, Hkv=3, group=2, Hs=6 if kind == "shared sets" else 3, F=6, dtype=dtype,
            seed=seed, schedule=schedule, rotated=10 if kind.startswith("partial") else None,
        )
        for seed in range(2)
    ]  # fmt: skip
    layout = LayerLayout.from_config(config, 3, len(problems[0].feature_map_k), 16, 6, dtype)
    sequence = SequenceLayout((layout, layout))
    pool = torch.full((4, sequence.row_bytes), 0xFF, dtype=torch.uint8)
    pools = pool, pool.clone()
    torchs, tritons = (
        [
            LayerState.bind(problem.weights(), layout, pages)
            for problem, pages in zip(problems, sequence.pages(own), strict=True)
        ]
        for own in pools
    )
    for problem, layer in zip(problems, torchs, strict=True):
        feed(portable, problem, layer)
    pools[1].copy_(pools[0])
    rows, counts = torch.tensor([STATE_INDEX, 0]).int(), torch.tensor([80, 80])
    context_shift.shift_layers(torchs, rows, counts)
    before = sequence.cleaned(pools[1][STATE_INDEX], 80)
    launches = []
    launch = shift.shift_kernel.run
    shift.shift_kernel.run = lambda *args, **options: launches.append(launch(*args, **options))
    try:
        shift.shift_layers(tritons, rows, counts)
    finally:
        shift.shift_kernel.run = launch
    assert len(launches) == 1
    expected, found = (sequence.cleaned(own[STATE_INDEX], 80) for own in pools)
    assert torch.equal(found, expected) and not torch.equal(found, before)
    assert (pools[1][[0, 1, 3]] == 0xFF).all()


@only("triton-interpreted")
@pytest.mark.parametrize("parts", [1, 4])
def test_one_launch_scores_sets_with_and_without_recent_pairs(backend, parts):
    """At every token; and the last launch joins the parts."""
    problem, _ = layers.layer("every token, recent pairs")
    state, other = layers.bind(problem), layers.bind(problem)
    feed(portable, dataclasses.replace(problem, q=problem.q[:80]), state)
    other.pages.copy_(state.pages)
    for t in range(80, 86):
        out = step(backend.cut_in(parts), problem, state, t)
        torch.testing.assert_close(out, step(portable, problem, other, t), **backend.close)
    for own, there in zip(state.groups, other.groups, strict=True):
        for name in ("positions", "H", "s"):
            found, expected = (getattr(g.views, name)[STATE_INDEX] for g in (own, there))
            torch.testing.assert_close(found, expected, **backend.close)


@only("triton-interpreted")
@pytest.mark.parametrize("kind", ["as the demo model", "shared sets", "recent pairs"])
def test_attention_in_a_launch_of_its_own_is_that_within_the_loop(backend, kind):
    """Bit for bit, of two prompts and padding between them."""
    from lola_vllm.kernels import backend as kernels

    problem, _ = layers.layer(kind)
    lengths, found = (45, 7, 23), []
    starts = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = problem.tokens(0, sum(lengths))
    batch = PrefillBatch(torch.tensor([1, 0, 3]), starts, torch.zeros(3, dtype=torch.long))
    for apart in (False, True):
        state, out = layers.bind(problem), torch.full_like(q, torch.nan)
        kernels.prefill(state, q, k, v, batch, out, apart=apart)
        found.append((out, state.pages))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert (found[1][0][45:52] == 0).all() and found[1][0].isfinite().all()
