"""Which KV heads need a hidden state.

A head that holds nearly all that it looks back to, or looks back to nothing, loses nothing without
one, and what its hidden state adds may mislead. So each is tried alone. A LoLA model reads plain
text, and predicts the last tokens with the gates of one KV head closed. How much further it is then
from the same weights with softmax attention is what the hidden state is worth.

What it is worth says, too, what the pairs cost that the head lacks. Where this is more than was
estimated (`sizes.scaled`), the head gets more pairs, and may do without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lola_vllm.engine.hf import LolaCache
from lola_vllm.engine.hf.attention import attentions
from lola_vllm.models.schema import CLOSED_FACTOR

PROMPTS = 6  # of plain text
LAST = 96  # tokens of each that are predicted again and again


@torch.no_grad()
def state_worths(model: Any, softmax: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """What the hidden states of KV heads are worth, each alone.

    Args:
        model: a LoLA model of transformers whose mixing is "lola".
        softmax: the same weights with softmax attention.
        prompts: token ids, all of one length, more than `LAST`.

    Returns:
        By layer that does not slide, `[Hkv]` float64: nats a token by which the divergence of its
        predictions from those with softmax attention grows. Infinite where nothing was folded in.
    """
    ids = torch.tensor([list(prompt) for prompt in prompts])
    text, last = ids.split([ids.shape[1] - LAST, LAST], dim=1)
    truth = [_log_probs(softmax(row[None], use_cache=False, logits_to_keep=LAST)) for row in ids]
    truth = [own.to(torch.bfloat16) for own in truth]  # all of them together take little memory
    cache = LolaCache(model.config)
    model(text, past_key_values=cache, logits_to_keep=1)

    def divergence() -> float:
        found = _log_probs(model(last, past_key_values=cache.fork()))
        rows = zip(found, truth, strict=True)
        return sum(_divergence(*row) for row in rows) / len(ids)

    layers = [layer for layer in attentions(model) if layer.lola_window is None]
    heads = model.config.num_key_value_heads
    whole, worths = divergence(), torch.zeros(len(layers), heads, dtype=torch.float64)
    for i in tqdm(range(worths.numel()), desc="hidden states", unit="head"):
        layer, head = divmod(i, heads)
        pages = cache.layers[layers[layer].layer_idx].layout.pages
        if not int(pages[head * len(pages) // heads].num_folded(torch.tensor(text.shape[1]))):
            worths[layer, head] = torch.inf
            continue
        with closed(layers[layer], head, heads):
            worths[layer, head] = divergence() - whole
    return list(worths)


@contextmanager
def closed(attention: Any, head: int, heads: int) -> Iterator[None]:
    """A layer whose KV head `head` of so many counts its exact pairs alone."""
    gates = attention.window_factors.data.unflatten(0, (heads, -1))[head]
    before = gates.clone()
    gates.fill_(CLOSED_FACTOR)
    try:
        yield
    finally:
        gates.copy_(before)


def _log_probs(output: Any) -> Tensor:
    return output.logits.float().log_softmax(-1)


def _divergence(found: Tensor, truth: Tensor) -> float:
    """Kullback and Leibler's, from the truth, in nats a token, of log-probabilities
    `[n, vocabulary]`."""
    return float(F.kl_div(found, truth.float(), log_target=True, reduction="batchmean"))
