"""What Triton's kernels promise besides: their plans, and what is compiled at start-up."""

import dataclasses
from functools import partial

import pytest
import torch

from lola_vllm.config import LolaConfig
from tests.support.backends import only
from tests.support.problem import make_problem

ETA = 10


def config_of(**fields):
    return LolaConfig(**{"window_size": ETA, **fields})


@only("triton-interpreted")
def test_splits_follow_the_shapes(backend, monkeypatch):
    from lola_vllm.kernels import aot, decode

    monkeypatch.setattr(decode, "num_processors", lambda device: 132)
    page, device = aot.llama_8b(), torch.device("cpu")
    counts = [decode.choose_splits(page, rows, device) for rows in (1, 4, 16, 17, 512)]
    assert counts == [8, 8, 2, 1, 1]  # 640 pairs are 10 tiles; two programs per processor


@only("triton-interpreted")
def test_pieces_end_at_the_update_points(backend):
    from lola_vllm.kernels import prefill

    layout = make_problem(1, config_of(update_interval=7, sink_size=2)).layout()
    start, context = torch.tensor([0, 30, 30, 31, 60]).numpy(), torch.tensor([0, 5, 27, 8]).numpy()
    plan = prefill.plan_chunks(start, context, layout)
    token, position, length, stop, row = plan.chunks
    # eta + sinks + 1 = 13, so 14 is the first point at which a pair leaves the window.
    assert list(zip(row, position, stop, strict=True)) == [
        (0, 0, 14), (2, 27, 28), (3, 8, 14), (0, 14, 21), (3, 14, 21), (0, 21, 28), (3, 21, 28),
        (0, 28, 30), (3, 28, 35), (3, 35, 37),
    ]  # fmt: skip
    assert (length == stop - position).all()
    assert (token == start[row] + position - context[row]).all()
    assert [(s.first, s.count, s.longest, s.update) for s in plan.steps] == [
        (0, 3, 14, True), (3, 2, 7, True), (5, 2, 7, True), (7, 2, 7, True), (9, 1, 2, False)
    ]  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """Launches of decode's and prefill's kernels: which, and their last argument."""
    from lola_vllm.kernels import decode, prefill, warmup

    monkeypatch.setattr(warmup, "_compiled", set())
    monkeypatch.setattr(decode, "num_processors", lambda device: 132)
    found = []
    plain = {"attend": decode.attend, "prefill": prefill.prefill}

    def counted(name, *args):
        found.append((name, args[-1]))
        plain[name](*args)

    monkeypatch.setattr(decode, "attend", partial(counted, "attend"))
    monkeypatch.setattr(prefill, "prefill", partial(counted, "prefill"))
    return found


@only("triton-interpreted")
def test_start_up_launches_all_variants_and_touches_no_page(backend, launched):
    from lola_vllm.kernels import decode, warmup

    problem = make_problem(
        1, config_of(sparse_cache_size=200, update_interval=5), dtype=torch.float32
    )
    state = problem.state()
    for _ in range(2):  # once for layers that are alike
        warmup.warm_up(state)
    layout, device = state.groups[0].layout, state.pages.device
    most = decode.choose_splits(layout, 1, device)
    assert most > 2
    splits = [last for name, last in launched if name == "attend"]
    wanted = {decode.choose_splits(layout, n, device) for n in range(1, 300)}
    assert set(splits) == wanted
    assert len(splits) == most.bit_length() and len(launched) == len(splits) + 1
    lolcats = state.with_weights(dataclasses.replace(state.weights, subtract_max=True))
    warmup.warm_up(lolcats)  # the other mixing is compiled as well
    assert len(launched) == 2 * len(splits) + 2
    assert (state.pages == 0xFF).all()
