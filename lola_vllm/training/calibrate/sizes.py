"""How many pairs each KV head should have.

A head's cache of n pairs holds the n tokens that score highest. Prompts say how much long-range
attention each token gets (`importance.py`), and so what one more pair adds to the head. Under a
fixed sum of pairs most is held where the next pair adds the same to every head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lola_vllm.training.calibrate.importance import PLAIN, PromptReads, scores


class AttentionGains:
    """The attention that each further pair of a layer's heads adds, summed over prompts.

    Args:
        reads: of the layer. weights: its importance tensor; None: the error alone chooses.

    Attributes:
        facts, plain: `[Hkv, n]` float64, of prompts that ask for facts and of plain text. Column i
            is the attention to tokens that i others score above.
    """

    def __init__(self, reads: Sequence[PromptReads], weights: Tensor | None) -> None:
        self.facts = self.plain = torch.zeros(len(reads[0].attention), 0, dtype=torch.float64)
        for read in reads:
            ranked = read.attention.gather(1, scores(read, weights).argsort(-1, descending=True))
            if read.of_facts:
                self.facts = _add(self.facts, ranked.double())
            else:
                self.plain = _add(self.plain, ranked.double())


def divide_among(layers: Sequence[AttentionGains], pairs: int, least: int) -> list[list[int]]:
    """Sizes per layer and KV head.

    Args:
        pairs: of a head, on average. least: of any head.

    Facts and plain text count as in the fit of importance, whatever their number of prompts is.
    """
    facts = sum(float(gains.facts.sum()) for gains in layers)
    plain = sum(float(gains.plain.sum()) for gains in layers)
    gains_of = []
    for gains in layers:
        total = _add(gains.facts / max(facts, 1e-9), PLAIN * gains.plain / max(plain, 1e-9))
        gains_of += list(total)
    sizes = divide(gains_of, pairs * len(gains_of), least)
    heads = len(sizes) // len(layers)
    return [sizes[i : i + heads] for i in range(0, len(sizes), heads)]


def divide(gains_of: Sequence[Tensor], total: int, least: int) -> list[int]:
    """Sizes of caches that sum to `total`.

    Args:
        gains_of: for each cache the attention that each further pair adds, `[n]`.
        least: of any cache.

    Raises:
        ValueError: `total` is less than `least` for each.
    """
    spare = total - least * len(gains_of)
    if spare < 0:
        raise ValueError(f"{total} pairs for {len(gains_of)} caches of {least} or more")
    # A pair beside which better ones stand is reached only with them, so gains that rise are
    # levelled; then the largest gains of all caches are those to take.
    gains = [_levelled(x.tolist())[least:] for x in gains_of]
    offers = sorted(
        ((gain, i) for i, of_cache in enumerate(gains) for gain in of_cache if gain > 0),
        key=lambda offer: -offer[0],
    )[:spare]
    sizes = [least] * len(gains_of)
    for _, i in offers:
        sizes[i] += 1
    # What adds nothing to any cache goes to all alike.
    rest = total - sum(sizes)
    return [size + rest // len(sizes) + (i < rest % len(sizes)) for i, size in enumerate(sizes)]


def _levelled(gains: list[float]) -> list[float]:
    """The slopes of the least concave curve above the running sum: gains that never rise."""
    blocks: list[tuple[float, int]] = []  # sum and length
    for gain in gains:
        block = (gain, 1)
        while blocks and blocks[-1][0] * block[1] < block[0] * blocks[-1][1]:
            last = blocks.pop()
            block = (last[0] + block[0], last[1] + block[1])
        blocks.append(block)
    return [amount / length for amount, length in blocks for _ in range(length)]


def _add(x: Tensor, y: Tensor) -> Tensor:
    n = max(x.shape[1], y.shape[1])
    x, y = (torch.nn.functional.pad(z, (0, n - z.shape[1])) for z in (x, y))
    return x + y
