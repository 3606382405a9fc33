"""Dithered rounding of the sums H and s (Lemma 3, `docs/bounds.md`).

With an update interval of 1, what a pair adds to a large float32 sum soon is below half of the
sum's last place. Rounding to nearest then loses it, or rounds it the same way at every fold. A
dither moves the point at which a fold rounds, from update to update, so that the sum is right on
average. It depends on the number of the update and the row of H alone. So a state is still a
function of the tokens, however they are split or batched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lola_vllm.core.ops.constants import DITHER_ROW, DITHER_UNIT, DITHER_UPDATE, EXPONENT_BITS


def dither(update: Tensor, num_rows: int) -> Tensor:
    """The dither of each row of H, and of s, for sums from 1 to below 2.

    Args:
        update: `[B]`, int64, number of each page's update (tokens seen over the update interval),
            below 2^31.
        num_rows: 2F.

    Returns:
        `[B, num_rows]`, float32, from -1/2 to below 1/2 of the last place of 1.
    """
    row = torch.arange(num_rows, device=update.device)
    place = (update[:, None] * DITHER_UPDATE + row * DITHER_ROW) & 0xFFFFFFFF
    return (place - ((place & 0x80000000) << 1)).to(torch.float32) * DITHER_UNIT  # as signed


def add_dithered(total: Tensor, added: Tensor, dither: Tensor) -> Tensor:
    """total + added, rounded with a dither that broadcasts with them. float64 needs none."""
    if total.dtype == torch.float64:
        return total + added
    power = (total.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    return total + (added + power * dither)
