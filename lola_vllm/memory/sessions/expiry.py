"""When states expire."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

from lola_vllm.memory.sessions.tiers import Stored

# Entries of states that are gone or expire at another time, before the list is made anew.
SPARE = 64


def earliest(times: Iterable[float | None]) -> float | None:
    """The first of times of which None is never; None: all are never."""
    return min((time for time in times if time is not None), default=None)


class Expiries:
    """The times at which states expire, the earliest first.

    Args:
        states: all states of the store, by id.
    """

    def __init__(self, states: Mapping[str, Stored]) -> None:
        self._states = states
        self._times: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._times)

    def add(self, state: Stored) -> None:
        """Take in a state of the store; one that never expires has no entry."""
        if state.header.expires is not None:
            heapq.heappush(self._times, (state.header.expires, state.id))
        if len(self._times) > 2 * len(self._states) + SPARE:
            self._times = [
                (other.header.expires, other.id)
                for other in self._states.values()
                if other.header.expires is not None
            ]
            heapq.heapify(self._times)

    def take(self, now: float) -> list[Stored]:
        """The states whose time is over; each is told once."""
        over = []
        while self._times and self._times[0][0] <= now:
            expires, name = heapq.heappop(self._times)
            state = self._states.get(name)
            if state is not None and state.header.expires == expires and state not in over:
                over.append(state)
        return over
