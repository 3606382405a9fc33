"""The rotation of keys by a context shift: RoPE of D positions, back or forward."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lola_vllm.core.ops.shift_schedule import ShiftSchedule


@dataclass(frozen=True, eq=False)
class KeyRotation:
    """How far a context shift rotates a key back: RoPE of D positions.

    Attributes:
        schedule: of the context shifts.
        cos, sin: `[R / 2]`, of the angles of D positions, R being the dimensions that RoPE rotates
            (the first R of a key; i and i + R / 2 are a pair).
    """

    schedule: ShiftSchedule
    cos: Tensor
    sin: Tensor

    @classmethod
    def of_table(cls, schedule: ShiftSchedule, cos: Tensor, sin: Tensor) -> KeyRotation:
        """Rotations by a model's own table.

        Args:
            cos, sin: `[2, R / 2]`, its rows of positions 0 and D. Tables may hold a factor
                (YaRN's), which row 0 shows.
        """
        scale = cos[0]
        return cls(schedule, (cos[1] / scale).contiguous(), (sin[1] / scale).contiguous())

    def check(self, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Whether it fits keys of `head_dim` numbers.

        Raises:
            ValueError: `cos` or `sin` has another shape, dtype or device; names it.
        """
        for name, row in (("rotation.cos", self.cos), ("rotation.sin", self.sin)):
            if row.shape != self.cos.shape or row.dim() != 1 or not 0 < 2 * len(row) <= head_dim:
                raise ValueError(
                    f"{name}: shape {list(row.shape)}, expected at most {head_dim // 2} angles"
                )
            if row.dtype != dtype or row.device != device:
                raise ValueError(
                    f"{name}: must be {dtype} on {device}, is {row.dtype} on {row.device}"
                )

    def rotate_back(self, k: Tensor) -> Tensor:
        """Keys `[..., d]` as RoPE would have left them D positions earlier."""
        return self._rotated(k, self.sin)

    def rotate_forward(self, k: Tensor) -> Tensor:
        """Keys `[..., d]` as RoPE would have left them D positions later."""
        return self._rotated(k, -self.sin)

    def rotate_by(self, k: Tensor, steps: Tensor) -> Tensor:
        """Keys `[..., d]` rotated back by `ShiftSchedule.rotation_steps` `[...]`."""
        rotated = self._rotated(k, self.sin * steps[..., None])
        return torch.where(steps[..., None] == 0, k, rotated)

    def _rotated(self, k: Tensor, sin: Tensor) -> Tensor:
        half = len(self.cos)
        one, two, rest = k.split([half, half, k.shape[-1] - 2 * half], dim=-1)
        rotated = [one * self.cos + two * sin, two * self.cos - one * sin]
        return torch.cat([*rotated, rest], dim=-1)

    def rotate_for_fold(self, k: Tensor) -> Tensor:
        """Keys `[..., d]` as the hidden state takes them from a page that was shifted."""
        for _ in range(self.schedule.fold_rotation):
            k = self.rotate_back(k)
        return k

    def rotated_map(self, feature_map_k: Tensor) -> Tensor:
        """Maps `[Hs, d, F]` that give of a key the features of `rotate_for_fold` of it:
        (k R) W = k (R W)."""
        cos, sin = self._fold_angles
        half, d = len(cos), feature_map_k.shape[1]
        one, two, rest = feature_map_k.split([half, half, d - 2 * half], dim=1)
        return torch.cat([cos * one - sin * two, sin * one + cos * two, rest], dim=1)

    @functools.cached_property
    def _fold_angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin `[R / 2, 1]` of the angles of `fold_rotation` times D positions."""
        rotated = torch.complex(self.cos.double(), self.sin.double()) ** self.schedule.fold_rotation
        return rotated.real[:, None].to(self.cos.dtype), rotated.imag[:, None].to(self.cos.dtype)
