"""What a KV head with few pairs costs a model's predictions.

A head that holds n pairs answers a query with o_n, where all pairs would give o. If g is the
gradient of a loss with respect to o, the loss changes by g (o_n - o), to the first order. The mean
of half its square is what n pairs cost. One pass backward gives g of every head and query, so that
every head and every n is tried at once, each alone.

In plain text the loss is the negative log-likelihood of a token that the model itself draws. Then
the cost is an estimate of the divergence from what the model predicts with all pairs (the mean of
these squares is its Fisher information). In prompts that ask for facts it is the log-odds of each
token of the answers, which go on falling where a likelihood is close to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lola_vllm.training.calibrate.importance import (
    LAST_QUERIES,
    features,
    log_errors,
    scores,
)
from lola_vllm.training.calibrate.prompts import CalibrationPrompt
from lola_vllm.training.calibrate.reader import attention_weights
from lola_vllm.training.calibrate.trials import SINKS, WINDOW

# Pairs of a head that are tried: none, and powers of the root of 2.
PAIRS = torch.tensor([0, *(round(8 * 2 ** (i / 2)) for i in range(25))])
ONE_IN = 16  # queries of a prompt, and the last ones where facts are asked for


class Losses(NamedTuple):
    """What so many pairs cost, each head alone, by layer that does not slide.

    Attributes:
        facts: `[layers, Hkv, len(PAIRS)]` float64, half the squared change of log-odds, per token
            that is answered. plain: likewise, nats per token of plain text.
    """

    facts: Tensor
    plain: Tensor


class _Layer(NamedTuple):
    """A layer's importance `[Hkv, d // 2 + d + 1]`, its key maps `[Hs, d, F]`, and the recent pairs
    of each KV head."""

    importance: Tensor
    maps: Tensor
    recent: Sequence[int]


class _Prompt:
    """A prompt that is read, and the sums of its queries."""

    def __init__(self, layers: Sequence[_Layer], queries: Tensor, has_states: bool) -> None:
        self._layers, self._queries, self._has_states = layers, queries, has_states
        heads = len(layers[0].recent)
        self.sums = torch.zeros(len(layers), heads, len(PAIRS), dtype=torch.float64)

    def see(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, s_aux: Tensor | None
    ) -> None:
        """See `AttentionReader`."""
        q, k, v = q.detach(), k.detach(), v.detach()
        out.register_hook(lambda gradient: self.add(layer, q, k, v, gradient[0], s_aux))

    def add(
        self, number: int, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, s_aux: Tensor | None
    ) -> None:
        """Add a layer's part.

        Args:
            q: `[Hq, T, d]`. k, v: `[Hkv, T, d]`. gradient: `[Hq, T, d]`, of the loss with respect
                to what attention answers. s_aux: `[Hq]`, logits of learned sinks.
        """
        layer, T = self._layers[number], k.shape[1]
        k, v = k.float(), v.float()
        seen = attention_weights(q, k, self._queries, s_aux)
        weights, of_sinks = seen.tensor_split([T], dim=-1)
        wide_v = v.repeat_interleave(len(q) // len(v), dim=0)
        effects = weights * (gradient[:, self._queries].float() @ wide_v.mT)
        order = self._ranked(layer, k, v)
        distances = self._queries[:, None] - torch.arange(T)
        for head, recent in enumerate(layer.recent):
            far = (distances >= WINDOW + recent) & (torch.arange(T) >= SINKS)  # [n, T]
            far = far[:, order[head]]
            group = slice(head * len(q) // len(k), (head + 1) * len(q) // len(k))
            own, told = (x[group][..., order[head]] for x in (weights, effects))
            self.sums[number, head] = _squares(own, told, far, of_sinks[group].sum(-1))

    def _ranked(self, layer: _Layer, k: Tensor, v: Tensor) -> Tensor:
        """Tokens by score `[Hkv, T]`, the largest first."""
        with_state, without = log_errors(k, v, layer.maps)
        errors = with_state if self._has_states else without
        return scores(errors, features(k, v), layer.importance).argsort(-1, descending=True)


def _squares(weights: Tensor, effects: Tensor, far: Tensor, of_sinks: Tensor) -> Tensor:
    """Squared changes of a loss if a head holds some of its far pairs, summed over queries.

    Args:
        weights, effects: `[group, n, T]`, attention of n queries to tokens in the order in which
            they are kept, and times what each token's value adds to the loss.
        far: `[n, T]`, tokens that a query does not see anyway. of_sinks: `[group, n]`, attention
            to learned sinks.

    Returns:
        `[len(PAIRS)]` float64.
    """
    # Where the last of so many far tokens stands, plus 1; all where there are fewer.
    at = torch.searchsorted(far.cumsum(-1), PAIRS.expand(len(far), -1).contiguous()) + (PAIRS > 0)
    at = at.clamp(max=far.shape[-1]).expand(len(weights), -1, -1)

    def held(x: Tensor) -> Tensor:  # [group, n, len(PAIRS)]; small sums stay exact
        of_far = torch.nn.functional.pad((x * far).cumsum(-1), (1, 0))
        return (x * ~far).sum(-1, keepdim=True) + of_far.gather(-1, at)

    mass = held(weights) + of_sinks[..., None]
    found = held(effects) / mass.clamp(min=torch.finfo(mass.dtype).tiny)
    change = (found - effects.sum(-1, keepdim=True)).sum(0)
    return change.double().square().sum(0) / 2


def pair_losses(
    model: Any,
    prompts: Sequence[CalibrationPrompt],
    importance: Sequence[Tensor],
    maps: Sequence[Tensor],
    recent: Sequence[Sequence[int]],
    has_states: bool,
    seed: int,
) -> Losses:
    """What pairs cost, besides attention sinks, the window and recent pairs.

    Args:
        model: a causal LM of transformers whose attention is `reader.attention`, which must be
            registered, and whose heads `order_heads` has seen. Its weights get no gradients.
        importance, maps, recent: by layer that does not slide, as `_Layer` has them.
        has_states: whether pairs are ranked by what a hidden state does not recall.
        seed: of the tokens that are drawn.
    """
    model.requires_grad_(False)
    layers = [_Layer(*own) for own in zip(importance, maps, recent, strict=True)]
    shape = (len(layers), len(recent[0]), len(PAIRS))
    sums = [torch.zeros(shape, dtype=torch.float64) for _ in Losses._fields]
    counts = [0] * len(sums)
    generator = torch.Generator().manual_seed(seed)
    for ids, _, answers in tqdm(prompts, desc="what pairs are worth", unit="prompt"):
        queries = torch.arange(0, len(ids), ONE_IN)
        asked = queries
        if answers is not None:
            asked = torch.tensor(answers).nonzero()[:, 0] - 1
            last = range(max(0, len(ids) - LAST_QUERIES), len(ids))
            queries = torch.tensor(sorted({*queries.tolist(), *last}))
        prompt = _Prompt(layers, queries, has_states)
        tokens = torch.tensor([ids])
        embedded = model.get_input_embeddings()(tokens).requires_grad_()
        logits = model(
            inputs_embeds=embedded, use_cache=False, logits_to_keep=asked, lola_window=prompt
        ).logits[0]
        if answers is None:
            _log_likelihood_of_drawn(logits, generator).backward()
        else:
            _log_odds(logits, tokens[0, asked + 1]).backward()
        kind = int(answers is None)
        sums[kind] += prompt.sums
        counts[kind] += len(asked)
    return Losses(*(of_kind / max(1, n) for of_kind, n in zip(sums, counts, strict=True)))


def _log_likelihood_of_drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Of a token for each row `[n, vocabulary]`, drawn from what it predicts, summed."""
    log_probs = logits.float().log_softmax(-1)
    drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
    return log_probs.gather(1, drawn).sum()


def _log_odds(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of a token `[n]` for each row `[n, vocabulary]` against all others, summed."""
    logits, tokens = logits.float(), tokens[:, None]
    others = logits.scatter(1, tokens, -torch.inf).logsumexp(-1)
    return (logits.gather(1, tokens)[:, 0] - others).sum()
