"""The log of what goes wrong with stored states on the ranks; the metrics count all of it."""

from __future__ import annotations

import logging
import time

from lola_vllm.memory.sessions.orders import Outcome

logger = logging.getLogger("vllm.lola")

WARN_S = 60.0


class FailureLog:
    """Logs one failure of each fault per minute. Not safe to use from several threads."""

    def __init__(self) -> None:
        self._warned: dict[str, float] = {}

    def take(self, outcome: Outcome) -> None:
        """Log what a rank reports, unless its fault was logged just now."""
        now = time.monotonic()
        if now - self._warned.get(outcome.fault, -WARN_S) < WARN_S:
            return
        self._warned[outcome.fault] = now
        logger.warning(
            "LoLA sessions: %s of state %s (%s): %s",
            outcome.event, outcome.state, outcome.tier, outcome.reason,
        )  # fmt: skip
