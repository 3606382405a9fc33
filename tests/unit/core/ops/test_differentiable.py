"""The form with gradients against the reference, and its gradients against finite differences."""

from __future__ import annotations

import pytest
import torch

from lola_vllm.core.config import LolaConfig, importance_size
from lola_vllm.core.ops import exact_attention
from lola_vllm.core.ops.differentiable import lola_attention_parallel
from lola_vllm.core.ops.reference import lola_attention

D, F = 6, 5
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
    (40, 4, 2, 4, dict(window_size=8, sparse_cache_size=7, update_interval=3, weighted=True)),
    (
        41,
        6,
        2,
        6,
        dict(window_size=4, sparse_cache_size=3, sparse_sharing="kv_head", weighted=True),
    ),
    (
        40,
        4,
        2,
        4,
        dict(window_size=6, sparse_cache_size=5, sink_size=2, weighted=True, sparse_dtype="int8"),
    ),
]


def problem(T: int, Hq: int, Hkv: int, Hs: int, B: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        normal(B, T, Hq, D) * 2,
        normal(B, T, Hkv, D) * 2,
        normal(B, T, Hkv, D),
        normal(Hq, D, F),
        normal(Hs, D, F),
        normal(Hq),
    )


def split(keys: dict, Hkv: int) -> tuple[LolaConfig, torch.Tensor | None]:
    """The parameters of a case, and importance weights where it is weighted."""
    keys = dict(keys)
    weighted = keys.pop("weighted", False)
    generator = torch.Generator().manual_seed(Hkv)
    weights = torch.randn(Hkv, importance_size(D), generator=generator, dtype=torch.float64)
    return LolaConfig(**keys), weights if weighted else None


@pytest.mark.parametrize(("T", "Hq", "Hkv", "Hs", "keys"), CASES)
def test_equals_the_reference(T: int, Hq: int, Hkv: int, Hs: int, keys: dict) -> None:
    config, importance = split(keys, Hkv)
    q, k, v, *weights = problem(T, Hq, Hkv, Hs)
    out = lola_attention_parallel(q, k, v, *weights, config, importance=importance)
    for row in range(2):
        expected, _ = lola_attention(q[row], k[row], v[row], *weights, config, importance)
        torch.testing.assert_close(out[row], expected, rtol=1e-9, atol=1e-9)


def test_chosen_chunks_are_those_of_the_whole() -> None:
    config = LolaConfig(window_size=8, sparse_cache_size=5, sink_size=2, update_interval=4)
    args = problem(38, 4, 2, 2)
    whole = lola_attention_parallel(*args, config)
    chunks = torch.tensor([7, 0, 9])
    part = lola_attention_parallel(*args, config, chunks=chunks)
    torch.testing.assert_close(part[:, :4], whole[:, 28:32])
    torch.testing.assert_close(part[:, 4:8], whole[:, :4])
    torch.testing.assert_close(part[:, 8:10], whole[:, 36:])


@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
def test_gradients(mixing: str) -> None:
    config = LolaConfig(window_size=4, sparse_cache_size=3, sink_size=1, mixing=mixing)
    args = tuple(x.requires_grad_() for x in problem(13, 2, 1, 1, B=1))
    assert torch.autograd.gradcheck(lambda *x: lola_attention_parallel(*x, config), args)


def test_gradients_pass_through_the_rounding_of_pairs() -> None:
    """As of an int8 model whose pairs are what they are rounded to: rounding changes none of them,
    and the steps to either side are not seen."""
    config = LolaConfig(window_size=4, sparse_cache_size=3, sparse_dtype="int8")
    q, k, v, *weights = problem(19, 2, 1, 1, B=1)
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


def test_half_precision_in_and_out_and_large_logits() -> None:
    config = LolaConfig(window_size=4, sparse_cache_size=3)
    q, k, v, *weights = (x.float() for x in problem(25, 2, 1, 1))
    out = lola_attention_parallel(q.bfloat16(), k.bfloat16(), v.bfloat16(), *weights, config)
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())
    out = lola_attention_parallel(q * 40, k * 40, v, *(w * 100 for w in weights), config)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("block", [1, 300])
@pytest.mark.parametrize("T, Hq, Hkv, Hs, keys", [CASES[1], CASES[2], CASES[7]])
def test_blocks_of_chunks_change_nothing(monkeypatch, block, T, Hq, Hkv, Hs, keys):
    """Neither answers nor gradients, whatever number of chunks is attended at a time."""
    config, weights = split(keys, Hkv)

    def run() -> list[torch.Tensor]:
        inputs = [x.requires_grad_() for x in problem(T, Hq, Hkv, Hs)]
        y = lola_attention_parallel(*inputs, config, importance=weights)
        return [y, *torch.autograd.grad((y * y.detach().cos()).sum(), inputs)]

    whole = run()
    monkeypatch.setattr(exact_attention, "BLOCK_LOGITS", block)
    for found, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
