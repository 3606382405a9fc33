"""Which columns of a batch hold tokens. The others are padding, which must not enter a state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class LolaModelError(ValueError):
    """An unsupported use of a LoLA model; the message names it and the remedy."""


@dataclass(frozen=True)
class NewTokens:
    """The tokens of one forward over a batch `[B, Q]`.

    Attributes:
        lengths: `[B]` int64 in host memory, tokens per row.
        mask: `[B, Q]` bool, true for a token; None where every column of every row is one.
    """

    lengths: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, attention_mask: Tensor | None, batch: int, columns: int) -> NewTokens:
        """The tokens that transformers' mask names.

        Args:
            attention_mask: `[B, seen + Q]`, nonzero for tokens; its last Q columns count. None:
                no padding.
            batch, columns: B and Q.

        Raises:
            LolaModelError: a mask of another shape.
        """
        full = cls(torch.full((batch,), columns), None)
        if attention_mask is None:
            return full
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != batch or shape[1] < columns:
            raise LolaModelError(
                f"attention_mask of shape {list(shape)}: LoLA decides itself which pairs a query "
                f"sees; give a padding mask [{batch}, {columns} or more columns]"
            )
        mask = attention_mask[:, shape[1] - columns :] != 0
        lengths = mask.sum(1).cpu()
        return full if bool((lengths == columns).all()) else cls(lengths, mask)

    @property
    def last_unpadded(self) -> int:
        """Of the last columns, how many are tokens in every row; a mask is there."""
        assert self.mask is not None
        return int(self.mask.all(0).flip(0).int().cumprod(0).sum())

    def positions(self, context: Tensor, device: torch.device) -> Tensor:
        """Positions `[B, Q]` that count tokens only, after `context [B]` earlier ones.

        LoLA's feature maps depend on absolute positions, unlike softmax attention. So the positions
        of a row must not depend on its padding.
        """
        context = context.to(device)[:, None]
        if self.mask is None:
            return context + torch.arange(int(self.lengths[0]), device=device)
        return context + (self.mask.to(device).long().cumsum(1) - 1).clamp(min=0)

    def check_positions(self, positions: Tensor) -> None:
        """Raise `LolaModelError` where positions `[B or 1, Q]` do not grow from token to token."""
        falls = positions.diff(dim=-1) <= 0
        if self.mask is not None:
            falls = falls & self.mask[:, 1:] & self.mask[:, :-1]
        if bool(falls.any()):
            raise LolaModelError(
                "position_ids do not grow along a row: sequences packed into one row would share a "
                "state; give each sequence a row of its own"
            )

    def pack(self, x: Tensor) -> Tensor:
        """The tokens of x `[B, Q, ...]`, row after row: `[N, ...]`."""
        return x.flatten(0, 1) if self.mask is None else x[self.mask.to(x.device)]

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """The inverse of `pack`, in the shape of `like`; zeros for padding."""
        if self.mask is None:
            return packed.view_as(like)
        out = torch.zeros_like(like)
        out[self.mask.to(like.device)] = packed
        return out

    def tokens_first(self, device: torch.device) -> Tensor | None:
        """`[B, Q]`: columns with each row's tokens before its padding; None if they are already."""
        if self.mask is None or not bool((self.mask[:, 1:] > self.mask[:, :-1]).any()):
            return None
        return (~self.mask).int().argsort(dim=1, stable=True).to(device)
