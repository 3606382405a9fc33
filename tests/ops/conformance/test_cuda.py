"""What CUDA C++ decode promises besides. "cuda" runs the extension's op on a GPU. "cuda-emulated"
compiles the same sources as plain C++ (csrc/cuda/emulate.h) and runs blocks, warps and barriers on
the CPU: it covers the arithmetic, the indexing, the launch geometry and missing barriers, but no
hardware."""

from dataclasses import replace

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import DecodeBatch
from tests.support.backends import only
from tests.support.layers import KINDS, bind, layer
from tests.support.problem import STATE_INDEX, decode, feed, make_problem, prefill

ETA = 10
CUDA = ("cuda-emulated", "cuda")


@only(*CUDA)
@pytest.mark.parametrize("parts", [1, 64])
def test_a_state_index_beyond_the_pool_touches_nothing(backend, parts):
    backend = backend.cut_in(parts)
    config = LolaConfig(window_size=200, sparse_cache_size=5, update_interval=1)
    problem = make_problem(2, config, d=64, dtype=torch.float32).to(backend.device)
    state, out = problem.state(num_pages=3), torch.zeros_like(problem.q)
    state_indices, lengths = (torch.tensor(x, device=backend.device) for x in ([3, 2**33], [1, 1]))
    backend.decode(state, *problem.tokens(0, 2), DecodeBatch(state_indices, lengths), out)
    assert out.isnan().all()
    assert (state.pages == 0xFF).all()


@only(*CUDA)
@pytest.mark.parametrize("parts", [1, 64])
def test_more_candidates_than_shared_memory_holds(backend, parts):
    """The lists of an update that long lie in memory, one per row and set."""
    config = LolaConfig(window_size=5, sparse_cache_size=20, update_interval=1700)
    problem = make_problem(1701, config, group=2, d=4, F=4, dtype=torch.float32)
    backend.cut_in(parts).check(problem, decode_from=1698)


@only("cuda-emulated")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 64])
def test_a_layer_is_three_launches_whatever_its_sizes(backend, kind, parts):
    """Each head has a group, and all groups share the launches."""
    backend = backend.cut_in(parts)
    problem, alone = layer(kind)
    ops = torch.ops.lola_emulated

    def launches(state, of):
        before = ops.launches()
        decode(backend, of, state, 0)
        return ops.launches() - before

    assert len(bind(problem).groups) == 3
    together = launches(bind(problem), problem)
    assert {launches(own.state(), own) for own in alone} == {3}
    assert together == 3


@only("cuda-emulated")
@pytest.mark.parametrize("kind", ["as the demo model", "every token"])
@pytest.mark.parametrize("parts", [1, 64])
def test_a_captured_step_is_planned_without_the_devices_data(backend, kind, parts):
    """What a graph holds serves every later step: rows that update, and rows that do not."""
    backend, ops = backend.cut_in(parts), torch.ops.lola_emulated
    problem, _ = layer(kind)
    expected_state, state = bind(problem), bind(problem)
    length = 48  # before the first context shift
    expected = feed(backend, problem, expected_state, decode_from=24)[24:length]
    prefill(backend, problem, state, 0, 24)
    q, k, v = (torch.full_like(x, torch.nan) for x in problem.tokens(0, 1))
    out = torch.full_like(q, torch.nan)
    batch = DecodeBatch(*(torch.full((1,), -(2**31), dtype=torch.int32) for _ in range(2)))
    hidden = state.device_table.clone()
    table = replace(state, device_table=hidden)
    truth = hidden.clone()
    hidden.fill_(-1)
    ops.capture(True)
    try:
        backend.decode(table, q, k, v, batch, out)
    finally:
        ops.capture(False)
    hidden.copy_(truth)
    batch.state_indices.fill_(STATE_INDEX)
    for t in range(24, length):
        for target, source in zip((q, k, v), problem.tokens(t, t + 1), strict=True):
            target.copy_(source)
        batch.seq_lens.fill_(t + 1)
        ops.replay()
        assert torch.equal(out[0], expected[t - 24])


@only("cuda", "triton")
def test_a_captured_graph_replays_updates_without_waiting(backend):
    """One graph serves steps that update and steps that do not, and no launch synchronizes."""
    config = LolaConfig(window_size=ETA, sparse_cache_size=6, update_interval=4)
    problem = make_problem(60, config, d=64, dtype=torch.bfloat16).to(backend.device)
    expected_state = problem.state()
    expected = [decode(backend, problem, expected_state, t) for t in range(60)]
    state = problem.state()
    q, k, v = (torch.zeros_like(x) for x in problem.tokens(0, 1))
    out = torch.zeros_like(q)
    nobody = torch.zeros(1, dtype=torch.int32, device=backend.device)  # while warming up
    batch = DecodeBatch(nobody, nobody.clone())
    backend.decode(state, q, k, v, batch, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            backend.decode(state, q, k, v, batch, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    batch.state_indices.fill_(STATE_INDEX)
    for t in range(60):
        for target, source in zip((q, k, v), problem.tokens(t, t + 1), strict=True):
            target.copy_(source)
        batch.seq_lens.fill_(t + 1)
        graph.replay()
        assert torch.equal(out, expected[t])
    for name in ("H", "s", "positions"):
        replayed, plain = (
            getattr(x.groups[0].views, name)[STATE_INDEX] for x in (state, expected_state)
        )
        assert torch.equal(replayed, plain)
