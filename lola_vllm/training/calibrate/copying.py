"""Which KV heads copy, and how many recent pairs each of them should have.

To go on with a passage word by word, a model finds the place where its words stood before and reads
what followed them. A few heads do this. They need every pair of the passage, and its neighbours, so
that a choice pair by pair does not serve them. Their newest pairs stay instead.

Passages of a text are begun again at its end. How much of its attention a head gives to the first
place of the passage says whether it copies. Many heads copy what stood near, and few of them what
stood far away. The recent pairs are divided so that as much as can be copied is, near and far.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

PASSAGE = 24  # tokens of a passage that stand in the text twice
GIVEN = 8  # of them whose attention does not count: they may stand at other places, too
PASSAGES = 24  # of a prompt
REPEATED = PASSAGES * PASSAGE  # tokens at the end of a prompt
LEAST_DISTANCE = 150  # tokens from a passage to its repeat, so that no window serves it
# Distances in a class differ by a factor of two at most.
CLASS_FACTOR = 2
# How well a passage is copied depends on the share of all heads' attention to it that recent pairs
# hold: as well as with all of it where they hold enough, and not at all with less than a part of
# that. How much is enough differs from model to model.
ENOUGH = (0.9, 0.8, 0.7, 0.6)
NOTHING = 0.31  # of enough
# How much a class of distances counts, against the next nearer one.
DECAY = 0.75


def repeat_passages(ids: Sequence[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """A text, and passages of it again.

    Args:
        ids: of the text, more than `LEAST_DISTANCE + PASSAGE` tokens.

    Returns:
        Token ids, and where in the text each passage begins. Their distances from the end of the
        text are spread evenly over orders of magnitude.
    """
    magnitudes = [(i + rng.random()) / PASSAGES for i in range(PASSAGES)]
    rng.shuffle(magnitudes)
    starts = []
    for magnitude in magnitudes:
        distance = LEAST_DISTANCE * (len(ids) / LEAST_DISTANCE) ** magnitude
        starts.append(min(max(0, len(ids) - int(distance)), len(ids) - PASSAGE))
    return list(ids) + [i for at in starts for i in ids[at : at + PASSAGE]], starts


def counted_tokens() -> Tensor:
    """The tokens of repeated passages that count, `[n]` int64, from the first repeat on."""
    return torch.arange(REPEATED).view(PASSAGES, PASSAGE)[:, GIVEN:].flatten()


def distance_class(distance: int) -> int:
    """Which class a distance of tokens belongs to; the first begins at `LEAST_DISTANCE`."""
    return max(0, int(math.log(max(distance, 1) / LEAST_DISTANCE, CLASS_FACTOR)))


def class_end(number: int) -> float:
    """The distance at which the class of this number ends."""
    return LEAST_DISTANCE * float(CLASS_FACTOR) ** (number + 1)


class CopyingAttention:
    """Records how much attention repeated passages give to their first place.

    Args:
        starts: of the passages, by prompt. length: tokens of a prompt before its passages are
            repeated. num_layers: of the model.
    """

    def __init__(self, starts: Sequence[Sequence[int]], length: int, num_layers: int) -> None:
        self._classes = distance_class(length) + 1
        self._sums: list[Tensor] = [torch.zeros(())] * num_layers
        self._counts = torch.zeros(self._classes)
        for of_prompt in starts:
            for at in of_prompt:
                self._counts[distance_class(length - at)] += 1
        self._prompts, self._length = iter(starts), length
        self._of_prompt: Sequence[int] = ()

    def begin(self, ids: Sequence[int]) -> Tensor:
        """See `AttentionRecorder`."""
        self._of_prompt = next(self._prompts)
        return len(ids) - REPEATED + counted_tokens()

    def add(self, layer: int, k: Tensor, v: Tensor, weights: Tensor) -> None:
        """See `AttentionRecorder`."""
        by_passage = weights.unflatten(1, (PASSAGES, PASSAGE - GIVEN))
        found = torch.zeros(self._classes, len(k))
        for i, at in enumerate(self._of_prompt):
            of_heads = by_passage[:, i, :, at : at + PASSAGE].sum(-1).mean(-1)  # [Hq]
            found[distance_class(self._length - at)] += of_heads.unflatten(0, (len(k), -1)).amax(1)
        self._sums[layer] = self._sums[layer] + found

    @property
    def attention(self) -> list[Tensor]:
        """By layer, the mean `[classes, Hkv]` by class of distance: of each token's attention the
        part that lies in the passage, of the query head of a KV head that gives most."""
        return [sums / self._counts.clamp(min=1)[:, None] for sums in self._sums]


def divide_recent(
    attention: Sequence[Tensor], pairs: int, longest: int, enough: float
) -> list[list[int]]:
    """Recent pairs by layer and KV head, such that passages are copied best.

    Each step gives one head as many pairs as reach to the end of a class, where that adds most for
    each pair. One head alone may add nothing, where passages need several. So the steps are tried
    from many beginnings: the n heads that copy most from a class hold all of it and of the nearer
    ones.

    Args:
        attention: as `CopyingAttention` has it. pairs: of a head, on average over all. longest:
            tokens from a passage to its repeat, at most. No head needs more pairs. enough: share of
            the attention to a passage with which it is copied as well as with all of it.

    Returns:
        Sizes that sum to `pairs` for each head, or to less if more would add nothing.
    """
    of_all = torch.cat(list(attention), dim=1).double()
    classes, heads = of_all.shape
    shares = of_all / of_all.sum(1, keepdim=True).clamp(min=1e-12)
    reached = torch.tensor([0] + [min(int(class_end(i)), longest) for i in range(classes)])
    starts = torch.tensor([LEAST_DISTANCE, *reached[1:-1].tolist()])
    counts = DECAY ** torch.arange(classes).double() * (reached[1:] / starts).log2().clamp(min=0)

    def copied(held: Tensor) -> Tensor:
        """How much is copied of passages of whose attention recent pairs hold so much, `[classes]`
        or `[classes, n]`."""
        missing = (enough - held).clamp(min=0) / (enough - NOTHING * enough)
        return counts @ (1 - missing**2).clamp(min=0)

    best, most = torch.zeros(heads, dtype=torch.long), -1.0
    for levels in _beginnings(shares, enough):
        if int(reached[levels].sum()) > pairs * heads:
            continue
        while _raise_one(levels, shares, reached, pairs * heads, copied):
            pass
        of_all_classes = float(copied(_held(levels, shares)))
        if of_all_classes > most:
            best, most = reached[levels], of_all_classes
    return [part.tolist() for part in best.split([x.shape[1] for x in attention])]


def _beginnings(shares: Tensor, enough: float) -> Iterator[Tensor]:
    """Levels to begin with: none, and for each class those of 1, 2, ... heads that together hold
    enough of it at most."""
    classes, heads = shares.shape
    yield torch.zeros(heads, dtype=torch.long)
    for of_class, number in zip(shares, range(1, classes + 1), strict=True):
        ranked, order = of_class.sort(descending=True, stable=True)
        for n in range(1, 1 + int((ranked.cumsum(0) - ranked < enough).sum())):
            levels = torch.zeros(heads, dtype=torch.long)
            levels[order[:n]] = number
            yield levels


def _held(levels: Tensor, shares: Tensor) -> Tensor:
    """What recent pairs hold of the attention `[classes, heads]`, by class.

    Args:
        levels: `[heads]`, how many classes the recent pairs of a head reach across.
    """
    return (shares * (torch.arange(len(shares))[:, None] < levels)).sum(1)


def _raise_one(
    levels: Tensor,
    shares: Tensor,
    reached: Tensor,
    total: int,
    copied: Callable[[Tensor], Tensor],
) -> bool:
    """Raise, in place, the level of the head where this adds most for each pair; whether any adds.

    Args:
        levels, shares: as for `_held`. reached: `[classes + 1]`, pairs of a level. total: pairs of
            all heads, at most. copied: how much is, by what recent pairs hold of each class.
    """
    held = _held(levels, shares)
    now, used = copied(held), reached[levels].sum()
    number = torch.arange(len(shares))[:, None]
    best, at = 0.0, (-1, 0)
    for level in range(1, len(reached)):
        added = shares * ((number >= levels) & (number < level))
        gains = copied(held[:, None] + added) - now
        costs = reached[level] - reached[levels]
        allowed = (costs > 0) & (used + costs <= total) & (gains > 1e-9)
        of_pair = torch.where(allowed, gains / costs.clamp(min=1), 0.0)
        if float(of_pair.max()) > best:
            best, at = float(of_pair.max()), (int(of_pair.argmax()), level)
    if best:
        levels[at[0]] = at[1]
    return best > 0
