"""Importance: what a pair's score is multiplied by, so that the cache holds what will be read.

The self-recall error says what the hidden state cannot recall. It does not say what will be asked
for. Importance is the exponential of a linear function, per KV head, of the lengths of the key's
rotary pairs, which do not depend on the position, and of the value (`docs/algorithm.md`,
section 6).

Its weights are fitted to what the cache is for. Prompts are read with softmax attention, which says
how much attention each token gets from far behind: its long-range attention. The fit makes the
long-range attention to the pairs that a cache of the head's size would keep as large as it can:
those whose error times importance is largest. "Would keep" is softened to a sigmoid of the distance
from the last one kept, so that it has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.core.ops.constants import RECALL_EPS
from lola_vllm.core.ops.reference import feature_map
from lola_vllm.training.calibrate.prompts import CalibrationPrompt

# First tokens draw attention whatever they are, and the last are in the window.
SKIPPED_TOKENS = 4
LAST_TOKENS = 80
# Attention from at most so many tokens later is near: a window could serve it.
NEAR_TOKENS = 128
# One query in so many asks, and all of the last ones, which ask for facts.
ONE_IN, LAST_QUERIES = 12, 120
# Attention below this is not worth a pair.
LEAST_ATTENTION = 0.05
# One prompt in so many is not fitted to, and judges.
JUDGED_ONE_IN = 5
# Of the fit: steps per prompt, size of the first step, penalty on standardized weights, share of
# what plain text reads beside facts, and width of the sigmoid in logarithms of scores.
EPOCHS, RATE, PENALTY, PLAIN, WIDTH = 6, 0.01, 0.15, 0.5, 0.3
# Sizes, interleaved: smaller caches stand for longer texts.
SHARES = (1.0, 0.6, 0.35)
_LEAST_TOTAL = 0.05  # of a prompt in a head; below it a step would be of noise


class PromptReads(NamedTuple):
    """What a layer attends to from far behind in a prompt.

    Attributes:
        features: `[Hkv, n, d // 2 + d]` float16.
        log_errors: `[Hkv, n]` float32, logarithms of recall errors. log_values: likewise, what they
            are without a hidden state, which recalls 0.
        attention: `[Hkv, n]` float32, the largest long-range attention that each token gets.
        of_facts: whether only attention to facts that are asked for counts.
    """

    features: Tensor
    log_errors: Tensor
    log_values: Tensor
    attention: Tensor
    of_facts: bool


def features(k: Tensor, v: Tensor) -> Tensor:
    """What importance is linear in: `[..., d]` each -> `[..., d // 2 + d]`."""
    half = k.shape[-1] // 2
    return torch.cat([torch.hypot(k[..., :half], k[..., half : 2 * half]), v], dim=-1)


def far_attention(weights: Tensor, queries: Tensor, near: Tensor) -> Tensor:
    """The largest attention that each token gets from far behind.

    Args:
        weights: `[Hq, n, T]`, softmax attention of n queries. queries: `[n]`, their positions.
        near: `[Hkv]`, attention from at most so many tokens later does not count.

    Returns:
        `[Hkv, T]`, over the queries that are further away and the heads of a group.
    """
    distances = queries[:, None] - torch.arange(weights.shape[-1])
    of_heads = weights.unflatten(0, (len(near), -1))  # [Hkv, group, n, T]
    return of_heads.masked_fill(distances <= near[:, None, None, None], 0).amax((1, 2))


def errors_of_others(k: Tensor, v: Tensor, feature_map_k: Tensor) -> tuple[Tensor, Tensor]:
    """Self-recall error of each pair in a state of all others, and without any state.

    Args:
        k, v: `[Hkv, T, d]`. feature_map_k: `[Hs, d, F]`.

    Returns:
        `[Hkv, T]` each; where a KV head has several state heads, means of SRE / ||v|| over them.
    """
    group = len(feature_map_k) // len(k)
    v_s = v.repeat_interleave(group, dim=0)
    phi = feature_map(k.repeat_interleave(group, dim=0), feature_map_k)  # [Hs, T, 2F]
    own = phi.square().sum(-1, keepdim=True)
    mass = phi @ phi.sum(1).unsqueeze(-1) - own + RECALL_EPS
    errors = (v_s - (phi @ (phi.mT @ v_s) - own * v_s) / mass).norm(dim=-1)
    lengths = v.norm(dim=-1)
    if group == 1:
        return errors, lengths
    errors = errors / v_s.norm(dim=-1).clamp(min=RECALL_EPS)
    return errors.unflatten(0, (-1, group)).mean(1), torch.ones_like(lengths)


def log_errors(k: Tensor, v: Tensor, feature_map_k: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of `errors_of_others`."""
    with_state, without = errors_of_others(k, v, feature_map_k)
    return with_state.clamp(min=RECALL_EPS).log(), without.clamp(min=RECALL_EPS).log()


class LongRangeAttention:
    """Records the long-range attention of prompts.

    Args:
        prompts: in the order in which they are read. maps: by layer, `[Hs, d, F]`.
        near: by layer, for each of its KV heads or one for all: attention from at most so many
            tokens later does not count, nor from `NEAR_TOKENS`.

    Attributes:
        reads: by layer, of all prompts.
    """

    def __init__(
        self,
        prompts: Iterable[CalibrationPrompt],
        maps: Sequence[Tensor],
        near: Sequence[Sequence[int]],
    ) -> None:
        self.reads: list[list[PromptReads]] = [[] for _ in maps]
        self._prompts, self._maps = iter(prompts), maps
        self._near = [torch.tensor(list(x)).clamp(min=NEAR_TOKENS) for x in near]
        self._asked: list[bool] | None = None
        self._queries = torch.zeros(0, dtype=torch.long)

    def begin(self, ids: Sequence[int]) -> Tensor:
        """See `AttentionRecorder`."""
        self._asked, T = next(self._prompts).asked, len(ids)
        last = range(max(0, T - LAST_QUERIES), T)
        self._queries = torch.tensor(sorted({*range(0, T, ONE_IN), *last}))
        return self._queries

    def add(self, layer: int, k: Tensor, v: Tensor, weights: Tensor) -> None:
        """See `AttentionRecorder`."""
        near = self._near[layer].expand(len(k))
        attention = far_attention(weights, self._queries, near)
        attention = attention.where(attention > LEAST_ATTENTION, 0)
        if self._asked is not None:
            attention = attention * torch.tensor(self._asked)
        kept = slice(SKIPPED_TOKENS, max(SKIPPED_TOKENS, k.shape[1] - LAST_TOKENS))
        errors, values = log_errors(k, v, self._maps[layer])
        self.reads[layer].append(
            PromptReads(
                features(k, v)[:, kept].half(),
                errors[:, kept],
                values[:, kept],
                attention[:, kept],
                self._asked is not None,
            )
        )


def without_states(read: PromptReads, has_state: Sequence[bool]) -> PromptReads:
    """The same where only some KV heads, by `has_state`, have a hidden state."""
    recalled = torch.tensor(list(has_state))[:, None]
    return read._replace(log_errors=torch.where(recalled, read.log_errors, read.log_values))


def parted(reads: Sequence[PromptReads]) -> tuple[list[PromptReads], list[PromptReads]]:
    """Those to fit to, and those to judge by."""
    judged = reads[JUDGED_ONE_IN - 1 :: JUDGED_ONE_IN]
    return [r for i, r in enumerate(reads, 1) if i % JUDGED_ONE_IN], list(judged)


def fit(
    reads: Sequence[PromptReads], sizes: Sequence[int], seed: int = 0, epochs: int = EPOCHS
) -> Tensor:
    """A layer's importance tensor, `[Hkv, d // 2 + d + 1]` float32.

    Args:
        reads: to fit to. sizes: pairs of each KV head. epochs: steps per prompt.

    The last column makes the mean of the log of importance zero.
    """
    total = sum(r.features.shape[1] for r in reads)
    mean = torch.stack([r.features.float().sum(1) for r in reads]).sum(0) / total
    square = torch.stack([r.features.float().square().sum(1) for r in reads]).sum(0) / total
    scale = (square - mean.square()).clamp(min=1e-6).sqrt()  # [Hkv, features]
    slopes = torch.zeros_like(mean, requires_grad=True)
    adam = torch.optim.Adam([slopes], lr=RATE, betas=(0.9, 0.99))
    order, steps = torch.Generator().manual_seed(seed), epochs * len(reads)
    pairs = torch.tensor(list(sizes))
    for step in range(steps):
        if step % len(reads) == 0:
            shuffled = torch.randperm(len(reads), generator=order).tolist()
        read = reads[shuffled[step % len(reads)]]
        adam.param_groups[0]["lr"] = RATE * (1 - step / steps)
        x = (read.features.float() - mean[:, None]) / scale[:, None]
        score = read.log_errors + torch.einsum("hnf,hf->hn", x, slopes)
        kept = (pairs * SHARES[step % len(SHARES)]).long()
        soft = torch.sigmoid((score - _last_kept(score.detach(), kept)) / WIDTH)
        available = read.attention.sum(-1)
        held = (read.attention * soft).sum(-1) / available.clamp(min=_LEAST_TOTAL)
        chosen = (kept > 0) & (kept < score.shape[1])  # else there is nothing to choose
        share = 1.0 if read.of_facts else PLAIN
        loss = PENALTY * slopes.square().sum() - share * (held * chosen).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    weights = slopes.detach() / scale
    return torch.cat([weights, -(weights * mean).sum(-1, keepdim=True)], dim=-1)


def held(
    reads: Iterable[PromptReads], sizes: Sequence[int], weights: Tensor | None
) -> tuple[Tensor, ...]:
    """How much long-range attention caches would hold.

    Args:
        weights: an importance tensor; None: the error alone chooses.

    Returns:
        `[Hkv]` each: the attention to pairs that are held, and all of it.
    """
    found = torch.zeros(2, len(sizes))
    pairs = torch.tensor(list(sizes))
    for read in reads:
        chosen = scores(read.log_errors, read.features, weights)
        kept = chosen >= _last_kept(chosen, pairs)
        kept &= (pairs > 0)[:, None]
        found[0] += (read.attention * kept).sum(-1)
        found[1] += read.attention.sum(-1)
    return tuple(found)


def scores(log_errors: Tensor, features: Tensor, weights: Tensor | None) -> Tensor:
    """The log of each pair's score `[Hkv, n]`, but for a constant of each head.

    Args:
        log_errors: `[Hkv, n]`. features: `[Hkv, n, d // 2 + d]`. weights: an importance tensor;
            None: the error alone counts.
    """
    if weights is None:
        return log_errors
    return log_errors + torch.einsum("hnf,hf->hn", features.float(), weights[:, :-1])


def _last_kept(score: Tensor, pairs: Tensor) -> Tensor:
    """The score `[Hkv, 1]` of the last one of each head's pairs that is kept."""
    n = score.shape[1]
    best = score.sort(dim=-1, descending=True).values
    return best.gather(1, (pairs.clamp(1, n) - 1).unsqueeze(-1))
