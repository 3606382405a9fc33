"""Assisted decoding: candidates of such lengths that a state takes back those that are rejected."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lola_vllm.core.ops.rollback import longest_draft
from lola_vllm.core.ops.shift_schedule import ShiftSchedule


class Candidates:
    """A candidate generator of transformers whose candidates end before the next update.

    Args:
        generator: makes candidates; all else is asked of it.
        interval, schedule: of the model, as for `longest_draft`.
        padding: columns of the row that are no tokens.
    """

    def __init__(
        self, generator: Any, interval: int, schedule: ShiftSchedule | None, padding: int
    ) -> None:
        self._generator = generator
        self._interval, self._schedule, self._padding = interval, schedule, padding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def get_candidates(
        self, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Candidates behind `input_ids [1, n]`, and their logits `[1, k, V]` or None."""
        found, logits = self._generator.get_candidates(input_ids, *args, **kwargs)
        known = input_ids.shape[1]
        longest = longest_draft(known - self._padding, self._interval, self._schedule)
        found = found[:, : known + longest]
        count = found.shape[1] - known
        return found, None if logits is None or not count else logits[:, :count]
