"""Which KV heads copy, and how many recent pairs each of them should have.

To go on with a passage word by word, a model finds the place where its words stood before and reads
what followed them. A few heads do this. They need every pair of the passage, and its neighbours, so
that a choice pair by pair does not serve them. Their newest pairs stay instead.

Passages of a text are begun again at its end. How much of its attention a head gives to the first
place of the passage says whether it copies. Many heads copy what stood near, and few of them what
stood far away. So each head has recent pairs up to the distance at which the others no longer need
its help.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

PASSAGE = 24  # tokens of a passage that stand in the text twice
GIVEN = 8  # of them whose attention does not count: they may stand at other places, too
PASSAGES = 24  # of a prompt
LEAST_DISTANCE = 150  # tokens from a passage to its repeat, so that no window serves it
# Distances in a class differ by a factor of two at most.
CLASS_FACTOR = 2
# Up to a distance R, heads that hold `NEAR_SHARE` of all heads' attention to a passage have it in
# their recent pairs. Up to `FAR` times R, heads that hold `FAR_SHARE` of it.
NEAR_SHARE, FAR_SHARE, FAR = 0.72, 0.6, 2


def repeat_passages(ids: Sequence[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """A text, and passages of it again.

    Args:
        ids: of the text, more than `LEAST_DISTANCE + PASSAGE` tokens.

    Returns:
        Token ids, and where in the text each passage begins. Their distances from the end of the
        text are spread evenly over orders of magnitude.
    """
    starts = []
    for _ in range(PASSAGES):
        distance = LEAST_DISTANCE * (len(ids) / LEAST_DISTANCE) ** rng.random()
        starts.append(min(max(0, len(ids) - int(distance)), len(ids) - PASSAGE))
    return list(ids) + [i for at in starts for i in ids[at : at + PASSAGE]], starts


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
        first = len(ids) - PASSAGES * PASSAGE
        repeats = torch.arange(first, len(ids)).view(PASSAGES, PASSAGE)
        return repeats[:, GIVEN:].flatten()

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


def divide_recent(attention: Sequence[Tensor], pairs: int) -> list[list[int]]:
    """Recent pairs by layer and KV head.

    Args:
        attention: as `CopyingAttention` has it. pairs: of a head, on average over all.

    Returns:
        Sizes that sum to `pairs` for each head, or to less if the heads that copy do not need as
        many. R (see `NEAR_SHARE`) is as large as this sum allows.
    """
    of_all = torch.cat(list(attention), dim=1)
    near, far = _reach(of_all, NEAR_SHARE), _reach(of_all, FAR_SHARE)

    def sizes(R: int) -> Tensor:
        return torch.maximum(near.clamp(max=R), far.clamp(max=FAR * R)).long()

    least, most, total = 0, int(class_end(len(of_all) - 1)), pairs * of_all.shape[1]
    while least < most:  # the largest R whose sizes fit
        middle = (least + most + 1) // 2
        if int(sizes(middle).sum()) <= total:
            least = middle
        else:
            most = middle - 1
    return [part.tolist() for part in sizes(least).split([x.shape[1] for x in attention])]


def _reach(attention: Tensor, share: float) -> Tensor:
    """Up to which distance `[heads]` a head is needed to hold a share of the attention.

    Args:
        attention: `[classes, heads]`.
    """
    order = attention.argsort(dim=1, descending=True)
    ranked = attention.gather(1, order)
    before = ranked.cumsum(1) - ranked
    needed = torch.zeros_like(attention, dtype=torch.bool)
    needed.scatter_(1, order, before < share * ranked.sum(1, keepdim=True))
    classes = needed.long().cumprod(0).sum(0)  # without a gap, from the nearest on
    ends = [0.0, *(class_end(i) for i in range(len(attention)))]
    return torch.tensor(ends)[classes]
