"""The places of positions: where tokens lie for RoPE, however long a sequence is.

A base model was trained on positions below its length P. Tokens of longer sequences get places
below P: each time the places run out, the origin moves by D positions, which is a rebase
(`docs/algorithm.md`, section 6). `ops/rebase.py` moves what a page holds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lola_vllm.config import LolaLlamaConfig

# Tokens of a sequence: pages and ops count positions in 32 bits.
MAX_LENGTH = 2**31 - 1

Numbers = TypeVar("Numbers", int, Tensor)


@dataclass(frozen=True)
class Places:
    """Counts positions from an origin that moves.

    Attributes:
        length: P, places that there are.
        interval: D, by how many positions a rebase moves the origin; 1 <= D < P.
        score_fade: gamma, see `score_decay`; >= 0.
        score_fade_rebases: K, rebases at which the score of a pair fades, 1 or more; None: all.
        fold_ahead: m, by how many rebases the keys that the hidden state takes are turned ahead.
        far_zone_start: F, first place of the far zone, in which old keys come to rest.
    """

    length: int
    interval: int
    score_fade: float = 0.0
    score_fade_rebases: int | None = None
    fold_ahead: int = 0
    far_zone_start: int = 0

    @classmethod
    def of(cls, config: LolaLlamaConfig) -> Places | None:
        """Those of a model; None where places are positions.

        Raises:
            LolaConfigError: an interval that does not suit the model's length.
        """
        lola, length = config.lola, config.max_position_embeddings
        lola.check_places(length)
        if not lola.rebase_interval:
            return None
        return cls(
            length,
            lola.rebase_interval,
            lola.score_fade,
            lola.score_fade_rebases,
            lola.fold_ahead,
            lola.far_zone_start,
        )

    @property
    def decay(self) -> float:
        """What a rebase multiplies H and s by: 1 - D / P."""
        return 1 - self.interval / self.length

    @property
    def score_decay(self) -> float:
        """What a rebase multiplies the scores of sparse pairs by: (1 - D / P)^gamma."""
        return float(self.decay**self.score_fade)

    def due(self, num_tokens: Numbers) -> Any:
        """Whether a page of so many tokens is rebased before its next token; bool, or a tensor."""
        return (num_tokens >= self.length) & ((num_tokens - self.length) % self.interval == 0)

    def moves(self, position: Tensor) -> Tensor:
        """How many rebases come before the tokens at positions (any integer shape)."""
        return ((position - self.length) // self.interval + 1).clamp(min=0)

    def place(self, position: Tensor) -> Tensor:
        """Where the tokens at positions (any integer shape) lie when they are new: below P."""
        return position - self.interval * self.moves(position)

    def score_factors(self, position: Tensor, num_tokens: Tensor) -> Tensor:
        """What the rebase of pages multiplies the scores of sparse pairs by.

        Args:
            position: of the pairs, any integer shape.
            num_tokens: that the pages hold, for all of them `due`; broadcasts with `position`.

        Returns:
            float64: `score_decay`, or 1 for a pair that has faded at `score_fade_rebases` others.
        """
        factors = torch.full(
            position.shape, self.score_decay, dtype=torch.float64, device=position.device
        )
        if self.score_fade_rebases is None:
            return factors
        met = self.moves(num_tokens) - self.moves(position)  # this one counts
        return factors.masked_fill(met > self.score_fade_rebases, 1.0)

    def origin(self, num_tokens: int) -> int:
        """By how many positions the origin of a page of so many tokens, 1 or more, has moved."""
        return self.interval * int(self.moves(torch.tensor(num_tokens - 1)))

    def steps(self, position: Tensor, num_tokens: Tensor) -> Tensor:
        """By how many D places the rebase of pages turns exact keys back, towards the far zone.

        Args:
            position: of the keys, any integer shape; not of sinks, which stay.
            num_tokens: that the pages hold, for all of them `due`; broadcasts with `position`.

        Returns:
            int64: 1 past the far zone, 0 in it, and -1 before it, where keys turn forward.
        """
        origin, start = num_tokens - self.length, self.far_zone_start  # before this rebase
        past = position - origin >= start + self.interval
        return past.long() - (position + origin < start).long()

    def exact(self, position: Tensor, num_tokens: int, sink_size: int) -> Tensor:
        """Where exact keys of a page of so many tokens lie, at positions (any integer shape)."""
        origin, start = self.origin(num_tokens), self.far_zone_start
        rest = start + (position - start) % self.interval
        back = torch.where(position - origin < start, rest, position - origin)
        moved = torch.where(position < start, rest.minimum(position + origin), back)
        return torch.where(position < sink_size, position, moved)

    def segments(self, context: int, count: int) -> list[int]:
        """Lengths of the pieces of `count` tokens after `context` others, none of which a rebase
        divides."""
        lengths, stop = [], context + count
        while context < stop:
            left = self.length - context
            if left <= 0:
                left = self.interval - (context - self.length) % self.interval
            lengths.append(min(left, stop - context))
            context += lengths[-1]
        return lengths


@dataclass(frozen=True, eq=False)
class Turn:
    """How far a rebase turns a key back: RoPE of D positions.

    Attributes:
        places: whose rebase. cos, sin: `[R / 2]`, of the angles of D positions, R being the
            dimensions that RoPE turns (the first R of a key; i and i + R / 2 are a pair).
    """

    places: Places
    cos: Tensor
    sin: Tensor

    @classmethod
    def of_table(cls, places: Places, cos: Tensor, sin: Tensor) -> Turn:
        """From a model's own table.

        Args:
            cos, sin: `[2, R / 2]`, its rows of positions 0 and D. Tables may hold a factor
                (YaRN's), which row 0 shows.
        """
        scale = cos[0]
        return cls(places, (cos[1] / scale).contiguous(), (sin[1] / scale).contiguous())

    def back(self, k: Tensor) -> Tensor:
        """Keys `[..., d]` as RoPE would have left them D positions earlier."""
        return self._turned(k, self.sin)

    def forward(self, k: Tensor) -> Tensor:
        """Keys `[..., d]` as RoPE would have left them D positions later."""
        return self._turned(k, -self.sin)

    def by(self, k: Tensor, steps: Tensor) -> Tensor:
        """Keys `[..., d]` turned back by `Places.steps` `[...]`."""
        turned = self._turned(k, self.sin * steps[..., None])
        return torch.where(steps[..., None] == 0, k, turned)

    def _turned(self, k: Tensor, sin: Tensor) -> Tensor:
        half = len(self.cos)
        one, two, rest = k.split([half, half, k.shape[-1] - 2 * half], dim=-1)
        turned = [one * self.cos + two * sin, two * self.cos - one * sin]
        return torch.cat([*turned, rest], dim=-1)

    def ahead(self, k: Tensor) -> Tensor:
        """Keys `[..., d]` as the hidden state takes them from a page that was rebased."""
        for _ in range(self.places.fold_ahead):
            k = self.back(k)
        return k

    def maps_ahead(self, feature_map_k: Tensor) -> Tensor:
        """Maps `[Hs, d, F]` that give of a key the features of `ahead` of it: (k R) W = k (R W)."""
        cos, sin = self._angles_ahead
        half, d = len(cos), feature_map_k.shape[1]
        one, two, rest = feature_map_k.split([half, half, d - 2 * half], dim=1)
        return torch.cat([cos * one - sin * two, sin * one + cos * two, rest], dim=1)

    @functools.cached_property
    def _angles_ahead(self) -> tuple[Tensor, Tensor]:
        """cos and sin `[R / 2, 1]` of the angles of `fold_ahead` times D positions."""
        turned = torch.complex(self.cos.double(), self.sin.double()) ** self.places.fold_ahead
        return turned.real[:, None].to(self.cos.dtype), turned.imag[:, None].to(self.cos.dtype)
