"""Which KV heads copy, and how many recent pairs each of them should have.

To go on with a passage word by word, a model finds the place where its words stood before and reads
what followed them. A few heads do this. They need every pair of the passage, and its neighbours, so
that a choice pair by pair does not serve them. Their newest pairs stay instead.

Passages of a text are begun again at its end. How much of its attention a head gives to the first
place of the passage says whether it copies. Copying takes all of these heads together, so each has
equally many recent pairs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

PASSAGE = 24  # tokens of a passage that stand in the text twice
GIVEN = 8  # of them whose attention does not count: they may stand at other places, too
PASSAGES = 12  # of a prompt
LEAST_DISTANCE = 150  # tokens from a passage to its repeat, so that no window serves it
# Heads that copy hold this share of the attention of all heads to the passages.
COPYING_SHARE = 0.75


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


class CopyingAttention:
    """Records how much attention repeated passages give to their first place.

    Args:
        starts: of the passages, by prompt. num_layers: of the model.

    Attributes:
        shares: by layer, the mean over all prompts `[Hkv]`: of each token's attention the part that
            lies in the passage, of the query head of a KV head that gives most.
    """

    def __init__(self, starts: Sequence[Sequence[int]], num_layers: int) -> None:
        self.shares: list[Tensor] = [torch.zeros(())] * num_layers
        self._prompts, self._starts = iter(starts), starts
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
        found = torch.stack(
            [
                by_passage[:, i, :, at : at + PASSAGE].sum(-1).mean(-1)
                for i, at in enumerate(self._of_prompt)
            ]
        )  # [PASSAGES, Hq]
        of_heads = found.mean(0).unflatten(0, (len(k), -1)).amax(1)
        self.shares[layer] = self.shares[layer] + of_heads / len(self._starts)


def divide_recent(shares: Sequence[Tensor], pairs: int) -> list[list[int]]:
    """Recent pairs by layer and KV head.

    Args:
        shares: as `CopyingAttention` has them. pairs: of a head, on average over all.

    Returns:
        Equally many for each head that copies, and none for the others.
    """
    flat = torch.cat(list(shares))
    order = flat.argsort(descending=True)
    reached = flat[order].cumsum(0) >= COPYING_SHARE * flat.sum()
    count = int(reached.long().argmax()) + 1
    sizes = torch.zeros(len(flat), dtype=torch.long)
    sizes[order[:count]] = pairs * len(flat) // count
    return [part.tolist() for part in sizes.split([len(x) for x in shares])]
