"""Dithered rounding of the sums H and s (`docs/algorithm.md`, section 3).

At interval 1 what a pair adds to a large float32 sum soon is below half of the sum's last place.
Rounding to nearest then loses it, or rounds it the same way at every fold. A fold therefore rounds
at a place of its own within the last place, which moves from update to update so that all places
have their turn: then the sum is right on average. The place depends on the number of the update and
the row of H alone, so a state is still a function of the tokens, however they are split or batched.
"""

from __future__ import annotations

import torch
from torch import Tensor

# As in csrc/dither.h. The place is UPDATE * update + ROW * row modulo 2^32, as a fraction of 2^32:
# multiples of the golden ratio spread most evenly, and the second number keeps rows apart.
UPDATE, ROW = 0x9E3779B9, 0xC13FA9A9
UNIT = 2.0**-55  # that fraction (2^-32) of the last place of 1 (2^-23)
EXPONENT_BITS = 0x7F800000  # of a float32


def dither(update: Tensor, rows: int) -> Tensor:
    """Dither `[B, rows]` of the rows of H, and of s, for sums from 1 to below 2.

    Args:
        update: `[B]`, int64, number of each page's update (tokens seen / C), below 2^31.
    """
    row = torch.arange(rows, device=update.device)
    place = (update[:, None] * UPDATE + row * ROW) & 0xFFFFFFFF
    return (place - ((place & 0x80000000) << 1)).to(torch.float32) * UNIT


def add_dithered(total: Tensor, added: Tensor, dither: Tensor) -> Tensor:
    """total + added, rounded with a dither. Sums of float64 need none."""
    if total.dtype == torch.float64:
        return total + added
    power = (total.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    return total + (added + power * dither)
