"""Prefill with its softmax part by xformers: what it gathers, refuses and compiles.

Its answers and pages are the conformance suite's (`conformance`), with a stand-in for its kernels.
"""

import logging
import re

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import PrefillBatch
from tests.support.problem import make_problem

pytest.importorskip("triton")
pytest.importorskip("xformers")


def test_every_query_sees_sinks_window_and_what_precedes_it_in_its_piece():
    """The mask and the gathered pairs, position by position."""
    from xformers.ops import fmha

    from lola_vllm.kernels.xformers_prefill import plan_gather

    for interval, sink, eta in ((1, 0, 3), (3, 2, 5), (8, 4, 8), (7, 0, 2)):
        config = LolaConfig(window_size=eta, update_interval=interval, sink_size=sink)
        layout = make_problem(1, config).layout()
        lengths, contexts = torch.tensor([17, 0, 1, 40, 6]), torch.tensor([0, 3, 29, 11, 1])
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        plan = plan_gather(starts.numpy(), contexts.numpy(), layout)
        mask = fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            plan.tokens.tolist(), plan.pairs.tolist(), device=torch.device("cpu")
        )
        sees = mask.materialize((int(starts[-1]), len(plan.source))) == 0
        stored = {int(at): (int(row), int(exact)) for at, row, exact in plan.stored.T}
        for row, (start, length, context) in enumerate(
            zip(starts.tolist(), lengths.tolist(), contexts.tolist(), strict=False)
        ):
            for i in range(length):
                n = context + i
                first = int(layout.window_start(torch.tensor(n)))
                positions = [*range(min(n, sink)), *range(min(first, n), n + 1)]
                expected = [
                    (row, int(layout.row(torch.tensor(p)))) if p < context else start + p - context
                    for p in positions
                ]
                found = [
                    stored.get(at, int(plan.source[at]))
                    for at in sees[start + i].nonzero().squeeze(1).tolist()
                ]
                assert found == expected, (interval, sink, eta, row, n)


SUITED = LolaConfig(window_size=16, update_interval=4, sparse_cache_size=8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"mixing": "lolcats"}, "'lolcats' needs the largest logit"),
        ({"update_interval": 3}, "window and sinks of 16 would be copied at every 3 tokens"),
        ({"sink_size": 1}, "window and sinks of 17"),
        ({"d": 20}, "head size 20"),
        ({"d": 264}, "head size 264"),
        ({"dtype": torch.float32}, r"float16 and bfloat16, not torch\.float32"),
    ],
)
def test_what_xformers_cannot_do_is_left_to_triton_and_logged(caplog, monkeypatch, change, words):
    from lola_vllm.kernels import xformers_prefill

    shape = {"d": 16, "dtype": torch.float16} | change
    own = {name: shape.pop(name) for name in change if name not in ("d", "dtype")}
    problem = make_problem(3, SUITED.model_copy(update=own), **shape)
    state = problem.state()
    xformers_prefill.unsuited.cache_clear()
    monkeypatch.setattr(logging.getLogger("vllm.lola"), "propagate", True)
    given = []
    monkeypatch.setattr(xformers_prefill.backend, "prefill", lambda *args: given.append(args[-1]))
    with caplog.at_level("WARNING", logger="vllm.lola"):
        for _ in range(2):
            xformers_prefill.prefill(state, problem.q, problem.k, problem.v, None, None)
    assert given == [xformers_prefill.attend if words is None else None] * 2
    assert len(caplog.records) == (words is not None)  # once, not at every call
    assert words is None or re.search(words, caplog.text)
    xformers_prefill.prefill(state, problem.q.bfloat16(), problem.k, problem.v, None, None)
    assert given[2:] == [None]


@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
def test_the_warm_up_asks_for_what_requests_will(monkeypatch, mixing):
    from lola_vllm.kernels import decode, prefill, warmup, xformers_prefill

    config = SUITED.model_copy(update={"mixing": mixing})
    problem = make_problem(1, config, dtype=torch.float16)
    prefills = []
    monkeypatch.setattr(warmup, "_compiled", set())
    monkeypatch.setattr(decode, "attend", lambda *args: None)
    monkeypatch.setattr(warmup.backend, "update", lambda *args: None)

    def note(layer, q, k, v, batch, out, softmax, apart):
        prefills.append(softmax)

    monkeypatch.setattr(prefill, "prefill", note)
    state = problem.state()
    for _ in range(2):  # once for layers that are alike
        xformers_prefill.warm_up(state)
    assert prefills == [xformers_prefill.attend if mixing == "lola" else None]
    warmup.warm_up(state)  # Triton's own is another variant
    assert prefills[1:] == [None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 128])
def test_xformers_own_kernels_equal_the_reference(d, dtype):
    """On a GPU (benchmarks/gpu.sh): a ragged batch with a live page and padding."""
    from lola_vllm.kernels import xformers_prefill

    if reason := xformers_prefill.missing():
        pytest.skip(reason)
    config = LolaConfig(window_size=64, sparse_cache_size=32, sink_size=4)
    problem = make_problem(500, config, Hkv=2, group=4, d=d, F=32, dtype=dtype)
    expected, device = problem.reference()[0], torch.device("cuda")
    problem = problem.to(device)
    state = problem.state()

    def feed(state_indices, contexts, spans):
        parts = [torch.cat(x) for x in zip(*(problem.tokens(*span) for span in spans), strict=True)]
        counts = [stop - start for start, stop in spans]
        out = torch.full_like(parts[0], torch.nan)
        starts = torch.tensor([0, *counts]).cumsum(0)
        batch = PrefillBatch(
            torch.tensor(state_indices, device=device), starts, torch.tensor(contexts)
        )
        xformers_prefill.prefill(state, *parts, batch, out)
        return out.double().cpu().split(counts)

    feed([2], [0], [(0, 201)])
    live, padding, new = feed([2, 0, 1], [201, 90, 0], [(201, 500), (90, 133), (0, 500)])
    assert (padding == 0).all()
    torch.testing.assert_close(live, expected[201:], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(new, expected, rtol=2e-2, atol=2e-2)
