"""Trials of divisions of recent pairs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lola_vllm.engine.hf.attention import order_heads
from lola_vllm.training.calibrate.copying import GIVEN, PASSAGE, PASSAGES
from lola_vllm.training.calibrate.trials import (
    RECENT_ATTENTION,
    SINKS,
    WINDOW,
    passage_log_probs,
    recent_attention,
)

HEADS, GROUP = 2, 3


def inputs(n: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n)
    return (
        torch.randn(1, HEADS * GROUP, n, 8, dtype=torch.float64),
        torch.randn(1, HEADS, T, 8, dtype=torch.float64),
        torch.randn(1, HEADS, T, 8, dtype=torch.float64),
    )


@pytest.mark.parametrize(("n", "T"), [(1, 5), (3, 3), (7, 200), (130, 301)])
@pytest.mark.parametrize("sizes", [[0, 0], [17, 1000], [0, 90]])
def test_a_head_sees_sinks_window_and_recent_pairs(n: int, T: int, sizes: list[int]) -> None:
    q, k, v = inputs(n, T)
    out, _ = recent_attention(
        SimpleNamespace(lola_number=1, lola_window=None), q, k, v, None, [[5, 5], sizes]
    )
    for head in range(HEADS * GROUP):
        of = head // GROUP
        for i in range(n):
            at = T - n + i
            seen = [j for j in range(at + 1) if j < SINKS or at - j < WINDOW + sizes[of]]
            weights = (k[0, of, seen] @ q[0, head, i] * 8**-0.5).softmax(0)
            torch.testing.assert_close(out[0, i, head], weights @ v[0, of, seen])


def test_without_sizes_a_head_sees_all() -> None:
    q, k, v = inputs(70, 70)
    module = SimpleNamespace(lola_number=0, lola_window=None)
    out, _ = recent_attention(module, q, k, v, None)
    torch.testing.assert_close(out, recent_attention(module, q, k, v, None, [[99, 99]])[0])


def test_log_probs_of_passages_by_division() -> None:
    """What a division gives is what the model says that reads all at once and sees as much, and
    one division leaves nothing behind for the next."""
    import transformers

    transformers.AttentionInterface.register(RECENT_ATTENTION, recent_attention)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS * GROUP,
        num_key_value_heads=HEADS,
        attn_implementation=RECENT_ATTENTION,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().double()
    for parameter in model.parameters():
        parameter.data *= 3
    order_heads(model)
    prompts = [torch.randint(50, (300 + PASSAGES * PASSAGE,)).tolist() for _ in range(2)]
    everything, nothing, some = [[2000] * 2] * 2, [[0] * 2] * 2, [[0, 200], [100, 0]]
    found = passage_log_probs(model, prompts, [nothing, everything, some, nothing])
    assert found.shape == (4,) and found.dtype == torch.float64
    assert found[0] == pytest.approx(float(found[3]))
    assert len({round(float(x), 6) for x in found}) == 3
    expected = 0.0
    for ids in prompts:
        says = model(torch.tensor([ids])).logits[0, :-1].detach().log_softmax(-1)
        of_tokens = says.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][-PASSAGES * PASSAGE :]
        expected += float(of_tokens.view(PASSAGES, PASSAGE)[:, GIVEN:].mean()) / 2
    assert float(found[1]) == pytest.approx(expected)
