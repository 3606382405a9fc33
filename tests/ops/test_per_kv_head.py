"""Layers whose KV heads have caches of different sizes: each head is what it is alone."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lola_vllm.config import LolaConfig, LolaConfigError
from lola_vllm.ops import DecodeBatch, HeadStates, bind_layer, choose_backend, cpp, portable
from lola_vllm.ops.contract import with_weights
from lola_vllm.ops.differentiable import lola_attention_parallel
from lola_vllm.ops.per_kv_head import per_kv_head, states_of
from lola_vllm.ops.shift_schedule import ShiftSchedule
from lola_vllm.state import LayerLayout, SequenceLayout
from tests.support.backends import TOLERANCE
from tests.support.problem import feed, make_problem

SIZES = (3, 0, 17)
T = 90
BASE = {"window_size": 8, "update_interval": 4, "sink_size": 2}
PORTABLE = SimpleNamespace(
    decode=per_kv_head(portable.decode), prefill=per_kv_head(portable.prefill)
)
OPS = [pytest.param(PORTABLE, id="portable")]
if cpp.load():
    OPS.append(pytest.param(cpp, id="cpp"))
KINDS = {
    "plain": {},
    "as the demo model": {"sparse_dtype": "int8", "context_shift": 16},
    "every token": {"update_interval": 1},
    "long interval": {"update_interval": 16},
    "shared sets": {"sparse_sharing": "kv_head"},
    "shifts alone": {"context_shift": 16},
    "recent pairs": {"recent_size": ((0, 2, 3),), "sparse_dtype": "int8"},
}
WEIGHTED = ("as the demo model", "long interval")  # with an importance


def layer(kind, dtype=torch.float32, seed=0):
    """A problem of three KV heads, and the same of each head alone."""
    config = LolaConfig(**{**BASE, **KINDS[kind]}, sparse_cache_size=(SIZES,))
    schedule = ShiftSchedule(64, 16, 1.0, 2) if config.context_shift else None
    Hs = 6 if kind == "shared sets" else None
    problem = make_problem(
        T,
        config,
        Hkv=3,
        group=4,
        Hs=Hs,
        F=6,
        importance=kind in WEIGHTED,
        dtype=dtype,
        seed=seed,
        schedule=schedule,
    )
    alone = []
    for i, own in enumerate(config.for_heads()):
        queries, states = slice(4 * i, 4 * i + 4), (Hs or 3) // 3
        alone.append(
            replace(
                problem,
                q=problem.q[:, queries],
                k=problem.k[:, i : i + 1],
                v=problem.v[:, i : i + 1],
                feature_map_q=problem.feature_map_q[queries],
                feature_map_k=problem.feature_map_k[i * states : (i + 1) * states],
                window_factors=problem.window_factors[queries],
                importance=None if problem.importance is None else problem.importance[i : i + 1],
                config=own,
            )
        )
    return problem, alone


def bind(problem, num_pages=4):
    """The layer with pages that are NaN."""
    Hs = len(problem.feature_map_k)
    layout = LayerLayout.from_config(
        problem.config, 3, Hs, problem.q.shape[-1], 6, problem.k.dtype,
        importance=problem.importance is not None,
    )  # fmt: skip
    pages = torch.full((num_pages, layout.page_bytes), 0xFF, dtype=torch.uint8)
    rotation = problem.rotation
    if rotation is not None:
        dtype = torch.promote_types(problem.k.dtype, torch.float32)
        rotation = replace(rotation, cos=rotation.cos.to(dtype), sin=rotation.sin.to(dtype))
    return bind_layer(problem.weights(), layout, pages, rotation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ops", OPS)
def test_a_head_of_a_layer_is_what_it_is_alone(ops, kind, dtype):
    problem, alone = layer(kind, dtype)
    state = bind(problem)
    assert isinstance(state, HeadStates)
    out = feed(ops, problem, state, cuts=[30, 31], decode_from=60)
    truth, _ = problem.reference()
    torch.testing.assert_close(out.double(), truth, **TOLERANCE[dtype])
    for i, (head, own) in enumerate(zip(state.heads, alone, strict=True)):
        single = own.state()
        expected = feed(ops, own, single, cuts=[30, 31], decode_from=60)
        assert torch.equal(out[:, 4 * i : 4 * i + 4], expected)
        assert torch.equal(head.pages[2], single.pages[2, : head.layout.page_bytes])


@pytest.mark.parametrize("ops", OPS)
def test_rows_of_a_batch_do_not_see_each_other(ops):
    """With padding between them, in prefill and in decode."""
    problems = [layer("as the demo model", seed=seed)[0] for seed in (1, 2)]
    weights = problems[0]
    others = [replace(p.of_layer(weights), rotation=weights.rotation) for p in problems]
    state, single = bind(weights), bind(weights)
    for state_index, problem in zip((1, 3), others, strict=True):
        feed(ops, problem, state, state_index=state_index)
        feed(ops, problem, single, state_index=state_index)
    q, k, v = (
        torch.stack([getattr(others[0], x)[0], getattr(others[0], x)[1], getattr(others[1], x)[2]])
        for x in "qkv"
    )
    out = torch.full_like(q, torch.nan)
    batch = DecodeBatch(torch.tensor([1, 0, 3]), torch.tensor([T + 1, 0, T + 1]))
    ops.decode(state, q, k, v, batch, out)
    assert (out[1] == 0).all()
    for row in (0, 2):
        alone = torch.full_like(q[:1], torch.nan)
        rows = slice(row, row + 1)
        one = DecodeBatch(batch.state_indices[rows], batch.seq_lens[rows])
        ops.decode(single, q[rows], k[rows], v[rows], one, alone)
        assert torch.equal(out[rows], alone)
    assert torch.equal(state.pages[[1, 3]], single.pages[[1, 3]])


@pytest.mark.parametrize("kind", ["plain", "as the demo model", "shared sets"])
def test_training_sees_what_is_served(kind):
    problem, _ = layer(kind, torch.float64)
    problem = replace(problem, rotation=None)
    config = problem.config.model_copy(update={"context_shift": 0})
    out = lola_attention_parallel(
        *(x[None] for x in (problem.q, problem.k, problem.v)),
        problem.feature_map_q, problem.feature_map_k, problem.window_factors, config,
        importance=problem.importance,
    )[0]  # fmt: skip
    state = bind(replace(problem, config=config))
    served = feed(PORTABLE, problem, state)
    torch.testing.assert_close(out, served, **TOLERANCE[torch.float64])


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not INTERPRETED, reason="of a process that interprets Triton")
def test_triton_takes_each_head():
    from lola_vllm.kernels import backend as kernels

    ops = SimpleNamespace(decode=per_kv_head(kernels.decode), prefill=per_kv_head(kernels.prefill))
    problem, _ = layer("as the demo model")
    out, expected = (
        feed(x, problem, bind(problem), cuts=[30], decode_from=80) for x in (ops, PORTABLE)
    )
    torch.testing.assert_close(out, expected, **TOLERANCE[torch.float32])


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is such a process")
def test_triton_interpreted():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "test_triton_takes_each_head"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-4000:] + done.stderr


@pytest.mark.parametrize("kind", ["as the demo model", "shifts alone"])
def test_other_weights_reach_every_head(kind):
    problem, _ = layer(kind)
    other, _ = layer(kind, seed=5)
    state = with_weights(bind(problem), other.weights(), bind(problem).rotation)
    fresh = bind(replace(problem.of_layer(other)))
    outs = [feed(PORTABLE, problem, x) for x in (state, fresh)]
    assert torch.equal(*outs)


def test_a_layer_of_equal_heads_has_one_page():
    config = LolaConfig(**BASE, sparse_cache_size=[[5, 5, 5], [5, 5, 6], 5])
    layouts = [
        LayerLayout.from_config(config.for_layer(i), 3, 3, 16, 6, torch.float32) for i in range(3)
    ]
    assert [len(layout.pages) for layout in layouts] == [1, 3, 1]
    assert layouts[0] == layouts[2] and layouts[1].sizes == [5, 5, 6]
    assert layouts[1].page_bytes == sum(page.page_bytes for page in layouts[1].pages)
    sequence = SequenceLayout(tuple(layouts))
    assert sequence.row_bytes == sum(page.page_bytes for page in sequence.layouts)
    rank = LayerLayout.from_config(config.for_layer(1), 1, 1, 16, 6, torch.float32, first_kv_head=2)
    assert rank.sizes == [6]


def test_only_what_is_valid_of_a_state_is_copied():
    problem, _ = layer("as the demo model")
    state = bind(problem)
    feed(PORTABLE, problem, state)
    sequence = SequenceLayout((state.layout,))
    clean = sequence.cleaned(state.pages[2], T)
    assert not torch.equal(clean, state.pages[2])  # NaN of what was never written
    again = bind(problem)
    again.pages[2] = clean
    q, k, v = (x[:1] for x in (problem.q, problem.k, problem.v))
    outs = []
    for one in (state, again):
        out = torch.full_like(q, torch.nan)
        PORTABLE.decode(one, q, k, v, DecodeBatch(torch.tensor([2]), torch.tensor([T + 1])), out)
        outs.append(out)
    assert torch.equal(*outs)


def test_every_back_end_takes_such_a_layer(monkeypatch):
    monkeypatch.setenv("LOLA_VLLM_OPS", "torch")
    choose_backend.cache_clear()
    try:
        ops = choose_backend("cpu", torch.float32)
        problem, _ = layer("plain")
        state = bind(problem)
        assert len(states_of(state)) == 3
        assert torch.equal(feed(ops, problem, state), feed(PORTABLE, problem, bind(problem)))
    finally:
        choose_backend.cache_clear()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([[1, 2], 3, 4], r"layer 0: 2 numbers for 3 KV heads; give one per KV head"),
        ([1, [1, 2, 3]], r"2 numbers for 3 layers; give one per layer"),
    ],
)
def test_sizes_that_do_not_fit_the_model(sizes, words):
    with pytest.raises(LolaConfigError, match=words):
        LolaConfig(sparse_cache_size=sizes).check_layers(3, 3)


@pytest.mark.parametrize("sizes", [[], [[]], [[1, -1]], [[1, 2.5]], [[1, [2]]], [True], -1, "8"])
def test_sizes_that_are_none(sizes):
    with pytest.raises(LolaConfigError, match="must be an integer of at least 0, or a list"):
        LolaConfig(sparse_cache_size=sizes)
