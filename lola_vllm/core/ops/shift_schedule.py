"""When contexts shift, and the RoPE position of every token, however long a sequence is.

A base model was trained on positions below its length P. Tokens of longer sequences get RoPE
positions below P: whenever these are used up, the context shifts back by D positions
(`docs/algorithm.md`, section 6). `core/ops/context_shift.py` shifts what a page holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lola_vllm.core.config import DecoderConfig

# Tokens of a sequence: pages and ops count positions in 32 bits.
MAX_LENGTH = 2**31 - 1

# Of models that are served: how fast scores of sparse pairs decay, and at how many context shifts.
# Measured on the demo model (`docs/recall.md`).
SCORE_DECAY, SCORE_DECAY_SHIFTS = 3.0, 3

Numbers = TypeVar("Numbers", int, Tensor)


@dataclass(frozen=True)
class ShiftSchedule:
    """The context shifts of any sequence of a model.

    Attributes:
        length: P, RoPE positions that there are.
        interval: D, positions of a context shift; 1 <= D < P.
        score_decay: gamma, see `score_decay_factor`; >= 0.
        score_decay_shifts: K, context shifts at which the score of a pair decays, 1 or more; None:
            all.
        fold_rotation: m, context shifts by which keys are rotated further before they are folded.
        bucket_start: F, first RoPE position of the bucket of old keys, `[F, F + D)`.
    """

    length: int
    interval: int
    score_decay: float = 0.0
    score_decay_shifts: int | None = None
    fold_rotation: int = 0
    bucket_start: int = 0

    @classmethod
    def of(cls, config: DecoderConfig) -> ShiftSchedule | None:
        """That of a model; None where contexts do not shift.

        Keys are rotated by half of the trained length before they are folded, and the bucket of old
        keys starts at 3/8 of it, if there is room (`docs/recall.md`).

        Raises:
            LolaConfigError: an interval that does not suit the model's length.
        """
        lola, length = config.lola, config.max_position_embeddings
        lola.check_context_shift(length)
        if not lola.context_shift:
            return None
        interval = lola.context_shift
        return cls(
            length,
            interval,
            SCORE_DECAY,
            SCORE_DECAY_SHIFTS,
            fold_rotation=length // interval // 2,
            bucket_start=min(3 * length // 8, length - 2 * interval),
        )

    @property
    def decay(self) -> float:
        """What a context shift multiplies H and s by: 1 - D / P."""
        return 1 - self.interval / self.length

    @property
    def score_decay_factor(self) -> float:
        """What a context shift multiplies the scores of sparse pairs by: (1 - D / P)^gamma."""
        return float(self.decay**self.score_decay)

    def due(self, num_tokens: Numbers) -> Any:
        """Whether a page of so many tokens is shifted before its next token; bool, or a tensor."""
        return (num_tokens >= self.length) & ((num_tokens - self.length) % self.interval == 0)

    def next_due(self, num_tokens: int) -> int:
        """The least count of at least `num_tokens` that is `due`."""
        return self.length + max(0, -(-(num_tokens - self.length) // self.interval)) * self.interval

    def num_shifts(self, position: Tensor) -> Tensor:
        """How many context shifts come before the tokens at positions (any integer shape)."""
        return ((position - self.length) // self.interval + 1).clamp(min=0)

    def rope_position(self, position: Tensor) -> Tensor:
        """RoPE positions of the tokens at positions (any integer shape) when they are new: below
        P."""
        return position - self.interval * self.num_shifts(position)

    def score_decay_factors(self, position: Tensor, num_tokens: Tensor) -> Tensor:
        """What the context shift of pages multiplies the scores of sparse pairs by.

        Args:
            position: of the pairs, any integer shape.
            num_tokens: that the pages hold, for all of them `due`; broadcasts with `position`.

        Returns:
            float64: `score_decay_factor`, or 1 for a pair that has decayed at
            `score_decay_shifts` others.
        """
        factors = torch.full(
            position.shape, self.score_decay_factor, dtype=torch.float64, device=position.device
        )
        if self.score_decay_shifts is None:
            return factors
        met = self.num_shifts(num_tokens) - self.num_shifts(position)  # this one counts
        return factors.masked_fill(met > self.score_decay_shifts, 1.0)

    def shifted_by(self, num_tokens: int) -> int:
        """The number of positions by which a context of 1 token or more has been shifted."""
        return self.interval * int(self.num_shifts(torch.tensor(num_tokens - 1)))

    def rotation_steps(self, position: Tensor, num_tokens: Tensor) -> Tensor:
        """The number of D positions by which a context shift rotates exact keys back, towards the
        bucket of old keys.

        Args:
            position: of the keys, any integer shape; not of sinks, which stay.
            num_tokens: that the pages hold, for all of them `due`; broadcasts with `position`.

        Returns:
            int64: 1 past the bucket, 0 in it, and -1 before it, where keys rotate forward.
        """
        shifted, start = num_tokens - self.length, self.bucket_start  # before this context shift
        past = position - shifted >= start + self.interval
        return past.long() - (position + shifted < start).long()

    def exact_rope_positions(self, position: Tensor, num_tokens: int, sink_size: int) -> Tensor:
        """RoPE positions of the exact keys of a page of so many tokens, at positions (any integer
        shape)."""
        shifted, start = self.shifted_by(num_tokens), self.bucket_start
        rest = start + (position - start) % self.interval
        back = torch.where(position - shifted < start, rest, position - shifted)
        moved = torch.where(position < start, rest.minimum(position + shifted), back)
        return torch.where(position < sink_size, position, moved)

    def segment_lengths(self, context: int, count: int) -> list[int]:
        """Lengths of the segments of `count` tokens after `context` others, none of which a context
        shift divides."""
        lengths, stop = [], context + count
        while context < stop:
            lengths.append(min(self.next_due(context + 1), stop) - context)
            context += lengths[-1]
        return lengths
