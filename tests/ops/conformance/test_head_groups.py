"""Layers whose KV heads have caches of different sizes: each head is what it is alone."""

from dataclasses import replace

import pytest
import torch

from lola_vllm.core.ops import DecodeBatch
from tests.support.backends import fewer, only
from tests.support.layers import KINDS, WITHOUT_H, T, bind, layer
from tests.support.problem import feed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@fewer("emulated", kind=["as the demo model", "every token", "shared sets", *WITHOUT_H])
@fewer("interpreted", kind=["as the demo model", *WITHOUT_H[:2]], dtype=[torch.float32])
def test_a_head_of_a_layer_is_what_it_is_alone(backend, kind, dtype):
    backend = backend.cut_in(1)  # a layer has more heads to fill a GPU with than one head has
    problem, alone = layer(kind, dtype)
    there = problem.to(backend.device)
    state = bind(there)
    assert len(state.groups) == 3
    decode_from = 60 if backend.prefills else 30
    out = feed(backend, there, state, cuts=[30, 31], decode_from=decode_from).cpu()
    truth, _ = problem.reference()
    torch.testing.assert_close(out.double(), truth, **backend.tolerance[dtype])
    for i, (group, own) in enumerate(zip(state.groups, alone, strict=True)):
        own = own.to(backend.device)
        single = own.state()
        expected = feed(backend, own, single, cuts=[30, 31], decode_from=decode_from).cpu()
        assert torch.equal(out[:, 4 * i : 4 * i + 4], expected)
        assert torch.equal(group.pages[2], single.pages[2, : group.layout.page_bytes])


@only("torch", "cpp")  # others cut batches of other sizes in other parts
def test_rows_of_a_batch_do_not_see_each_other(backend):
    """With padding between them, in prefill and in decode."""
    problems = [layer("as the demo model", seed=seed)[0] for seed in (1, 2)]
    weights = problems[0]
    weights = weights.to(backend.device)
    others = [
        replace(p.to(backend.device).of_layer(weights), rotation=weights.rotation) for p in problems
    ]
    state, single = bind(weights), bind(weights)
    for state_index, problem in zip((1, 3), others, strict=True):
        feed(backend, problem, state, state_index=state_index)
        feed(backend, problem, single, state_index=state_index)
    q, k, v = (
        torch.stack([getattr(others[0], x)[0], getattr(others[0], x)[1], getattr(others[1], x)[2]])
        for x in "qkv"
    )
    out = torch.full_like(q, torch.nan)
    counts = [[1, 0, 3], [T + 1, 0, T + 1]]
    batch = DecodeBatch(*(torch.tensor(x, device=backend.device) for x in counts))
    backend.decode(state, q, k, v, batch, out)
    assert (out[1] == 0).all()
    for row in (0, 2):
        alone = torch.full_like(q[:1], torch.nan)
        rows = slice(row, row + 1)
        one = DecodeBatch(batch.state_indices[rows], batch.seq_lens[rows])
        backend.decode(single, q[rows], k[rows], v[rows], one, alone)
        assert torch.equal(out[rows], alone)
    assert torch.equal(state.pages[[1, 3]], single.pages[[1, 3]])
