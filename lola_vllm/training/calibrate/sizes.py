"""How many pairs each KV head should have.

What a model's predictions lose where a head has few pairs says what one more is worth
(`losses.py`). Under a fixed sum of pairs least is lost where the next pair is worth the same to
every head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lola_vllm.training.calibrate.importance import PLAIN
from lola_vllm.training.calibrate.losses import PAIRS, Losses


def divide_among(losses: Losses, pairs: int, least: int, most: int) -> list[list[int]]:
    """Sizes per layer and KV head.

    Args:
        pairs: of a head, on average. least: of any head. most: pairs beyond which none is worth
            anything.

    Facts and plain text count as in the fit of importance, whatever their number of prompts is.
    """
    facts, plain = (x / x[..., 0].sum().clamp(min=1e-9) for x in losses)
    total = facts + PLAIN * plain
    gains = [-x.diff() for x in _between(total.flatten(0, 1), most)]
    sizes = divide(gains, pairs * len(gains), least)
    heads = total.shape[1]
    return [sizes[i : i + heads] for i in range(0, len(sizes), heads)]


def cost_at(losses: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """What heads of so many pairs cost `[layers, Hkv]`, of one of `Losses`."""
    flat = torch.tensor(list(sizes)).flatten()
    of_all = _between(losses.flatten(0, 1), int(flat.max()))
    return of_all.gather(1, flat[:, None]).view(losses.shape[:2])


def scaled(losses: Losses, sizes: Sequence[Sequence[int]], worths: Tensor, least: float) -> Losses:
    """Losses with plain text's larger where a trial says so.

    A head that looks at everything a little fails all queries alike, and then later layers fail
    with it. Gradients of single queries do not show this, and closing its hidden state does.

    Args:
        sizes: pairs of the heads whose hidden state was closed. worths: `[layers, Hkv]`, nats a
            token that each hidden state was worth then; infinite where none was closed.
        least: below it a worth is noise.
    """
    known = worths.isfinite() & (worths > least)
    factor = worths / cost_at(losses.plain, sizes).clamp(min=1e-9)
    return losses._replace(plain=losses.plain * factor.where(known, 1).clamp(min=1)[..., None])


def _between(losses: Tensor, most: int) -> Tensor:
    """Losses of 0, 1, ... `most` pairs `[n, most + 1]`, on straight lines over the logarithm of
    pairs between those of `PAIRS`, `[n, len(PAIRS)]`."""
    x = (torch.arange(most + 1) + PAIRS[1]).double().log()
    known = (PAIRS + PAIRS[1]).double().log()
    right = torch.searchsorted(known, x).clamp(1, len(PAIRS) - 1)
    part = (x - known[right - 1]) / (known[right] - known[right - 1])
    return losses[:, right - 1].lerp(losses[:, right], part.clamp(max=1))


def divide(gains_of: Sequence[Tensor], total: int, least: int) -> list[int]:
    """Sizes of caches that sum to `total`.

    Args:
        gains_of: for each cache what each further pair is worth, `[n]`.
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
