"""RoPE by any number of positions, from the model's own table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RopeTable:
    """Cosines and sines of RoPE's angles at every position of the trained length P.

    Attributes:
        cos, sin: `[P, R / 2]`, R being the dimensions that RoPE rotates (the first R of a key; i
            and i + R / 2 are a pair).
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of_rows(cls, cos: Tensor, sin: Tensor) -> RopeTable:
        """A table of a model's rows of positions 0 to P - 1, which may hold a factor (YaRN's)."""
        scale = cos[0]
        return cls((cos / scale).contiguous(), (sin / scale).contiguous())

    def move(self, k: Tensor, by: Tensor) -> Tensor:
        """Keys as RoPE would have left them so many positions later.

        Args:
            k: `[..., d]`, in the table's dtype. by: int64, `[]` or as k without its last dimension;
                more than -P and less than P.
        """
        if not bool(by.any()):
            return k
        far = by.abs()
        cos, sin = self.cos[far], self.sin[far] * by.sign().unsqueeze(-1).to(k.dtype)
        half = self.cos.shape[1]
        one, two, rest = k.split([half, half, k.shape[-1] - 2 * half], dim=-1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)
