"""What the C++ ops promise besides: threads and company change no bit, and offsets are wide."""

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import DecodeBatch, LayerState, PrefillBatch
from tests.support.backends import only
from tests.support.problem import STATE_INDEX, feed, make_problem, prefill, with_a_trend

ETA = 10


@only("cpp")
def test_threads_change_no_bit(backend):
    """However prompts are shared out: fewer streams than threads, as many, more."""
    config = LolaConfig(window_size=16, sparse_cache_size=24, sink_size=2)
    problem = make_problem(230, config, group=3, d=32, dtype=torch.bfloat16)
    state_indices = torch.tensor([3, 1, 2], dtype=torch.int32)
    starts, none = torch.tensor([0, 101, 102, 230]), torch.zeros(3, dtype=torch.int64)
    found = []
    for threads in (1, 2, 3, 7, 16):
        torch.set_num_threads(threads)
        state, out = problem.state(), torch.empty_like(problem.q)
        state.pages.zero_()
        batch = PrefillBatch(state_indices, starts, none)
        backend.prefill(state, *problem.tokens(0, 230), batch, out)
        found.append((out, state.pages))
    for out, pages in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(pages, found[0][1])


@only("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [20, 64])
def test_a_decoded_row_does_not_depend_on_batch_or_threads(backend, dtype, d):
    """Bit by bit: threads take turns, and the rows of a turn share their feature maps."""
    config = LolaConfig(window_size=ETA, sparse_cache_size=21, update_interval=5)
    rows, T = 41, 60
    problem = make_problem(T, config, dtype=dtype, d=d, F=24, group=3)
    q, k, v = (torch.randn(rows, *x.shape[1:]).to(dtype) for x in problem.tokens(0, T))
    lengths = torch.tensor([T + 1 - row % 7 * 9 for row in range(rows)])
    state_indices, answers = torch.arange(1, rows + 1, dtype=torch.int32), []
    for batch, count in ((1, 1), (rows, 1), (rows, 2), (rows, 5), (7, 3)):
        torch.set_num_threads(count)
        state = problem.state(num_pages=rows + 1)
        for state_index, length in zip(state_indices.tolist(), lengths.tolist(), strict=True):
            prefill(backend, problem, state, 0, length - 1, state_index)
        out = torch.full_like(q, torch.nan)
        for at in range(0, rows, batch):
            part = slice(at, at + batch)
            step = DecodeBatch(state_indices[part], lengths[part])
            backend.decode(state, q[part], k[part], v[part], step, out[part])
        answers.append((out, state.groups[0].views.H[1:]))
    for out, H in answers[1:]:
        assert torch.equal(out, answers[0][0])
        assert torch.equal(H.view(torch.int32), answers[0][1].view(torch.int32))


@only("cpp")
def test_page_offsets_are_64_bit(backend):
    """A page that begins 2^31 elements behind the first gives what it gives beside it."""
    config = LolaConfig(window_size=ETA, sparse_cache_size=5)
    problem = make_problem(61, config, dtype=torch.float32)
    near = problem.state(num_pages=2)
    out = feed(backend, problem, near, [17], state_index=1)
    try:
        room = torch.empty(2**33 + near.layout.page_bytes, dtype=torch.uint8)
    except RuntimeError:
        pytest.skip("8 GiB of address space are not to be had")
    pages = room.as_strided((2, near.layout.page_bytes), (2**33, 1))
    pages[1] = 0xFF
    far = LayerState.bind(problem.weights(), near.layout, pages)
    assert torch.equal(feed(backend, problem, far, [17], state_index=1), out)
    assert torch.equal(far.groups[0].views.H[1], near.groups[0].views.H[1])


# What two runs of the same arithmetic leave in a page to the last bit.
STORED = (
    "positions", "score_weights", "sparse_k_scale", "sparse_v_scale", "sparse_k", "sparse_v", "H",
    "s",
)  # fmt: skip


@only("cpp")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [32, 20])
@pytest.mark.parametrize(
    ("fields", "importance"),
    [({}, False), ({"sparse_dtype": "int8"}, False), ({}, True), ({"recent_size": 40}, True)],
    ids=["plain", "int8", "importance", "recent"],
)
def test_a_prompt_makes_the_choices_of_single_steps(backend, dtype, d, fields, importance):
    """Prefill bounds scores, and carries bounds from update to update; steps compute them all. Both
    leave the same, though old pairs leave again and again."""
    config = LolaConfig(window_size=16, sparse_cache_size=96, **fields)
    problem = with_a_trend(1500, config, dtype=dtype, d=d, F=16, group=1, importance=importance)
    if importance:
        problem.importance *= 0.3
    _, carried = backend.run(problem, [700])
    _, stepwise = backend.run(problem, decode_from=0)
    for name in STORED:
        one, two = (getattr(x.groups[0].views, name)[STATE_INDEX] for x in (carried, stepwise))
        assert torch.equal(one, two), name
