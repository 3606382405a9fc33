"""The form with gradients against the reference, and its gradients against finite differences."""

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import exact_attention
from lola_vllm.core.ops.differentiable import lola_attention_parallel
from tests.support.problem import Problem, make_problem

CASES = [
    # T, Hq, Hkv, Hs, config
    (37, 4, 2, 2, dict(window_size=8, sparse_cache_size=5, sink_size=2)),
    (40, 4, 2, 4, dict(window_size=8, sparse_cache_size=7, update_interval=3)),
    (41, 6, 2, 6, dict(window_size=4, sparse_cache_size=3, sparse_sharing="kv_head")),
    (29, 3, 1, 1, dict(window_size=5, sparse_cache_size=0, update_interval=1, mixing="lolcats")),
    (33, 2, 1, 2, dict(window_size=3, sparse_cache_size=4, update_interval=7, sink_size=5)),
    (7, 2, 2, 2, dict(window_size=64, sparse_cache_size=16, sink_size=4)),
    (3, 2, 1, 1, dict(window_size=2, sparse_cache_size=2, sink_size=9)),
    (26, 4, 2, 2, dict(window_size=4, sparse_cache_size=6, mixing="lolcats", sink_size=1)),
]
WEIGHTED = [
    (40, 4, 2, 4, dict(window_size=8, sparse_cache_size=7, update_interval=3)),
    (41, 6, 2, 6, dict(window_size=4, sparse_cache_size=3, sparse_sharing="kv_head")),
    (40, 4, 2, 4, dict(window_size=6, sparse_cache_size=5, sink_size=2, sparse_dtype="int8")),
    (39, 4, 2, 2, dict(window_size=6, sparse_cache_size=5, hidden_state=[[True, False]])),
]


def problems(
    T: int, Hq: int, Hkv: int, Hs: int, config: LolaConfig, weighted: bool = False
) -> list[Problem]:
    """Two sequences of a layer."""
    one, two = (
        make_problem(
            T, config, Hkv=Hkv, group=Hq // Hkv, Hs=Hs, d=6, F=5, importance=weighted, seed=seed,
            scale=2.0,
        )
        for seed in (T, T + 1)
    )  # fmt: skip
    return [one, two.of_layer(one)]


def arguments(rows: list[Problem]) -> tuple[torch.Tensor, ...]:
    """Of the parallel form, in float64: q, k, v `[B, T, heads, d]`, and weights."""
    layer = rows[0]
    heads = (torch.stack([getattr(row, name) for row in rows]) for name in "qkv")
    return (*heads, layer.feature_map_q, layer.feature_map_k, layer.window_factors)


@pytest.mark.parametrize(
    ("T", "Hq", "Hkv", "Hs", "keys", "weighted"),
    [*((*case, False) for case in CASES), *((*case, True) for case in WEIGHTED)],
)
def test_equals_the_reference(T, Hq, Hkv, Hs, keys, weighted):
    rows = problems(T, Hq, Hkv, Hs, LolaConfig(**keys), weighted)
    importance = rows[0].importance
    out = lola_attention_parallel(*arguments(rows), rows[0].config, importance=importance)
    for found, row in zip(out, rows, strict=True):
        torch.testing.assert_close(found, row.reference()[0], rtol=1e-9, atol=1e-9)


def test_chosen_chunks_are_those_of_the_whole():
    config = LolaConfig(window_size=8, sparse_cache_size=5, sink_size=2, update_interval=4)
    args = arguments(problems(38, 4, 2, 2, config))
    whole = lola_attention_parallel(*args, config)
    chunks = torch.tensor([7, 0, 9])
    part = lola_attention_parallel(*args, config, chunks=chunks)
    torch.testing.assert_close(part[:, :4], whole[:, 28:32])
    torch.testing.assert_close(part[:, 4:8], whole[:, :4])
    torch.testing.assert_close(part[:, 8:10], whole[:, 36:])


@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
def test_gradients(mixing):
    config = LolaConfig(window_size=4, sparse_cache_size=3, sink_size=1, mixing=mixing)
    rows = problems(13, 2, 1, 1, config)[:1]
    args = tuple(x.requires_grad_() for x in arguments(rows))
    assert torch.autograd.gradcheck(lambda *x: lola_attention_parallel(*x, config), args)


def test_gradients_pass_through_the_rounding_of_pairs():
    """As of an int8 model whose pairs are what they are rounded to: rounding changes none of them,
    and the steps to either side are not seen."""
    config = LolaConfig(window_size=4, sparse_cache_size=3, sparse_dtype="int8")
    q, k, v, *weights = arguments(problems(19, 2, 1, 1, config)[:1])
    # Integers up to 127 with one of 127 in each row: the rounding to int8 keeps them.
    k, v = ((x * 40).round().clamp(-126, 126) / 64 for x in (k, v))
    k[..., 0] = v[..., 0] = 127 / 64
    args = [x.requires_grad_() for x in (q, k, v, *weights)]
    plain = config.model_copy(update={"sparse_dtype": "model"})
    found = [lola_attention_parallel(*args, each) for each in (config, plain)]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(out.square().sum(), args) for out in found]
    for one, two in zip(*gradients, strict=True):
        assert bool(two.any())
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_half_precision_in_and_out_and_large_logits():
    config = LolaConfig(window_size=4, sparse_cache_size=3)
    q, k, v, *weights = (x.float() for x in arguments(problems(25, 2, 1, 1, config)))
    out = lola_attention_parallel(q.bfloat16(), k.bfloat16(), v.bfloat16(), *weights, config)
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())
    out = lola_attention_parallel(q * 40, k * 40, v, *(w * 100 for w in weights), config)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("block", [1, 300])
@pytest.mark.parametrize("T, Hq, Hkv, Hs, keys", [CASES[1], CASES[2], CASES[7]])
def test_blocks_of_chunks_change_nothing(monkeypatch, block, T, Hq, Hkv, Hs, keys):
    """Neither answers nor gradients, whatever number of chunks is attended at a time."""
    rows = problems(T, Hq, Hkv, Hs, LolaConfig(**keys))

    def run() -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in arguments(rows)]
        y = lola_attention_parallel(*inputs, rows[0].config)
        return [y, *torch.autograd.grad((y * y.detach().cos()).sum(), inputs)]

    whole = run()
    monkeypatch.setattr(exact_attention, "BLOCK_LOGITS", block)
    for found, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
