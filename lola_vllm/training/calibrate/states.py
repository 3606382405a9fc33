"""Which KV heads need a hidden state.

A head that holds nearly all that it looks back to, or looks back to nothing, loses nothing without
one, and what its hidden state adds may mislead. So each is tried alone. A LoLA model reads plain
text, and predicts the last tokens with the gates of one KV head closed. How much further it is then
from the same weights with softmax attention is what the hidden state is worth.

A head whose hidden state is worth much looks at everything a little. Attention that is spread so
thin counts for nothing when pairs are divided (`importance.py`), but thousands of pairs hold much
of it. Such a head gets them, and is tried again.
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
# Nats a token that a hidden state is worth in a head with too few pairs, and how many more it gets.
WORTH_PAIRS, MORE_PAIRS = 0.02, 2048


@torch.no_grad()
def predictions(softmax: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """What softmax attention makes of the last tokens of prompts.

    Returns:
        Of each prompt, log-probabilities `[1, LAST, vocabulary]` in bfloat16.
    """
    ids = [torch.tensor([list(prompt)]) for prompt in prompts]
    found = [_log_probs(softmax(row, use_cache=False, logits_to_keep=LAST)) for row in ids]
    return [own.to(torch.bfloat16) for own in found]  # all of them together take little memory


@torch.no_grad()
def state_worths(
    model: Any,
    truth: Sequence[Tensor],
    prompts: Sequence[Sequence[int]],
    tried: Sequence[Sequence[int]] | None = None,
) -> list[Tensor]:
    """What the hidden states of KV heads are worth, each alone.

    Args:
        model: a LoLA model of transformers whose mixing is "lola".
        truth: the `predictions` of the same weights with softmax attention.
        prompts: token ids, all of one length, more than `LAST`.
        tried: by layer that does not slide, a number for each KV head; 0 is not tried. Default: all
            are.

    Returns:
        By layer that does not slide, `[Hkv]` float64: nats a token by which the divergence of its
        predictions from those with softmax attention grows. Infinite where nothing was folded in,
        and where it was not tried.
    """
    ids = torch.tensor([list(prompt) for prompt in prompts])
    text, last = ids.split([ids.shape[1] - LAST, LAST], dim=1)
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
        folded = int(pages[head * len(pages) // heads].num_folded(torch.tensor(text.shape[1])))
        if not folded or not (tried is None or tried[layer][head]):
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
