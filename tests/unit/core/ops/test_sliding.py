"""Sliding layers: what each back end answers from a ring is softmax attention under a mask."""

import pytest
import torch
from torch import Tensor

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import (
    DecodeBatch,
    LayerState,
    LolaWeights,
    PrefillBatch,
    choose_backend,
    portable,
    sliding,
)
from lola_vllm.core.ops.contract import Backend
from lola_vllm.core.state import LayerLayout

HQ, HKV, D, W = 6, 2, 24, 11
PORTABLE = Backend("torch", portable.decode, portable.prefill)
TORCH = Backend("torch", sliding.decode, sliding.prefill)


def make(dtype: torch.dtype, window: int = W, sinks: Tensor | None = None) -> LayerState:
    config = LolaConfig(window_size=window - 1, update_interval=1, sparse_cache_size=0)
    layout = LayerLayout.from_config(config, HKV, HKV, D, 0, dtype)
    weights = LolaWeights.of_window(HQ, HKV, D, "lola", torch.empty(0, dtype=dtype), None, sinks)
    pages = torch.full((4, layout.page_bytes), 255, dtype=torch.uint8)  # leftovers that are NaN
    return LayerState.bind(weights, layout, pages)


def masked(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: Tensor | None = None) -> Tensor:
    """`[T, H, d]` each, in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(HQ // HKV, dim=0) for x in (k, v))
    at = torch.arange(q.shape[1])
    seen = (at <= at[:, None]) & (at > at[:, None] - window)
    logits = (q @ k.mT * D**-0.5).masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1)
    if sinks is not None:
        one_more = sinks.double()[:, None, None].expand(-1, len(at), 1)
        weights = torch.cat([logits, one_more], -1).softmax(-1)[..., :-1]
    return (weights @ v).transpose(0, 1)


@pytest.mark.parametrize("window", [2, W, 300])
@pytest.mark.parametrize("name", ["sliding", "portable", "chosen"])
@pytest.mark.parametrize("sinks", [None, torch.linspace(-2, 3, HQ)], ids=["none", "sinks"])
def test_any_split_gives_masked_softmax(name, window, sinks):
    """Beside a row of padding, which neither reads nor writes a page."""
    layer = make(torch.float32, window, sinks)
    ops = {"sliding": TORCH, "portable": PORTABLE}.get(name)
    ops = ops or sliding.ops_of(layer.layout, choose_backend("cpu", torch.float32), "cpu")
    torch.manual_seed(0)
    n = 340
    q, k, v = (torch.randn(n, heads, D) for heads in (HQ, HKV, HKV))
    wanted, answers, at = masked(q, k, v, window, sinks), torch.empty(n, HQ, D), 0
    for length in (1, 5, 1, 1, 30, 1, 290, 1, 1):
        own = slice(at, at + length)
        rows, out = [x[own] for x in (q, k, v)], answers[own]
        if length == 1:
            rows = [torch.cat([x, x]) for x in rows]
            both, seen = torch.empty(2, HQ, D), torch.tensor([at + 1, 7])
            ops.decode(layer, *rows, DecodeBatch(torch.tensor([2, 0]), seen), both)
            assert not both[1].any()
            out.copy_(both[0])
        else:
            batch = PrefillBatch(torch.tensor([2]), torch.tensor([0, length]), torch.tensor([at]))
            ops.prefill(layer, *rows, batch, out)
        at += length
    assert at == 331
    torch.testing.assert_close(answers[:at].double(), wanted[:at], atol=1e-5, rtol=1e-5)
    assert (layer.pages[[0, 1, 3]] == 255).all()


def test_gradients_flow_through_whole_sequences():
    torch.manual_seed(1)
    q, k, v = (torch.randn(300, h, D, dtype=torch.float64, requires_grad=True) for h in (HQ, 2, 2))
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    mine = sliding.attend(*heads, W)[0].transpose(0, 1)
    torch.testing.assert_close(mine, masked(q, k, v, W))
    weight = torch.randn_like(mine)
    grads = [torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (mine, masked(q, k, v, W))]
    torch.testing.assert_close(grads[0], grads[1])
