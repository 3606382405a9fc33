"""Questions to libraries take turns: few are asked at once, and clients wait equally long.

A question is heard alone, and documents are looked for in one thread. So questions wait here, where
that costs nothing, and not in the engine. Who would wait longer than `WAIT_S` is told at once when
to come again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from weakref import WeakValueDictionary

from fastapi import HTTPException

# One question is heard while documents are looked for that another one reads.
AT_ONCE = 2
# Longer than a person looks at a page that does nothing, and shorter than clients' time-outs.
WAIT_S = 8.0
NEWEST = 0.2  # the weight of the newest time in the mean


class Turns:
    """Turns of clients, one question of each after the other.

    Args:
        at_once: questions that have a turn. wait_s: that a question waits at most.
    """

    def __init__(self, at_once: int = AT_ONCE, wait_s: float = WAIT_S) -> None:
        self.at_once, self.wait_s = at_once, wait_s
        self.seconds = 0.0  # between two ends of turns while questions wait, by the newest of them
        self._free = asyncio.Semaphore(at_once)
        # One question of each client waits for a turn, and its others for that one.
        self._first: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._waiting: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        """Questions that wait."""
        return sum(self._waiting.values())

    def check(self, client: str) -> None:
        """Refuse a client's next question if it would wait too long.

        Raises:
            HTTPException: 429, with the seconds after which to ask again.
        """
        own = self._waiting[client]
        before = sum(min(n, own + (other != client)) for other, n in self._waiting.items())
        wait = (before + 1) * self.seconds
        if self._free.locked() and wait > self.wait_s:
            raise self._refusal(wait - self.wait_s)

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """A turn, which is over with the context.

        Raises:
            HTTPException: as `check`, now or after `wait_s`.
        """
        self.check(client)
        if self._free.locked():
            self._waiting[client] += 1
            try:
                await asyncio.wait_for(self._wait(client), self.wait_s)
            except (TimeoutError, asyncio.TimeoutError):
                raise self._refusal(self.seconds * (1 + self.waiting / 2)) from None
            finally:
                self._waiting -= Counter([client])
        else:
            await self._free.acquire()
        began = time.monotonic()
        try:
            yield
        finally:
            took = (time.monotonic() - began) / self.at_once
            self.seconds = took if not self.seconds else (
                (1 - NEWEST) * self.seconds + NEWEST * took
            )  # fmt: skip
            self._free.release()

    async def _wait(self, client: str) -> None:
        async with self._first.setdefault(client, asyncio.Lock()):
            await self._free.acquire()

    def _refusal(self, seconds: float) -> HTTPException:
        after = max(1, math.ceil(seconds))
        return HTTPException(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"{self.waiting} questions to libraries wait, and none waits longer than "
            f"{self.wait_s:g} s; ask again in {after} s",
            headers={"Retry-After": str(after)},
        )
