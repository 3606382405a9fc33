"""Questions to libraries take turns: few are asked at once, and clients wait equally long.

A question is heard alone, and documents are looked for in one thread. So questions wait here, where
that costs nothing, and not in the engine. Who would wait longer than `WAIT_S` is told at once when
to come again.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

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
        self.wait_s = wait_s
        self.at_once = at_once
        self.seconds = 0.0  # between two ends of turns while questions wait, by the newest of them
        self._running = 0
        self._round = 0  # of the newest turn: in a round each client that waits has one
        self._numbers = itertools.count()
        # By round and order: the client of a question, and what gets its turn.
        self._queue: list[tuple[int, int, str, asyncio.Future[None]]] = []

    @property
    def waiting(self) -> int:
        """Questions that wait."""
        return len(self._queue)

    def check(self, client: str) -> int:
        """The round of a client's next question. One that would wait too long is refused.

        Raises:
            HTTPException: 429, with the seconds after which to ask again.
        """
        number = self._round + sum(one[2] == client for one in self._queue)
        before = sum(one[0] <= number for one in self._queue)
        wait = (before + 1) * self.seconds
        if self._running >= self.at_once and wait > self.wait_s:
            raise self._refusal(wait - self.wait_s)
        return number

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """A turn, which is over with the context.

        Raises:
            HTTPException: as `check`, now or after `wait_s`.
        """
        number = self.check(client)
        if self._running < self.at_once:
            self._running += 1
        else:
            await self._wait(number, client)  # who ends gives the turn on
        began = time.monotonic()
        try:
            yield
        finally:
            took = (time.monotonic() - began) / self.at_once
            self.seconds = took if not self.seconds else (
                (1 - NEWEST) * self.seconds + NEWEST * took
            )  # fmt: skip
            self._next()

    async def _wait(self, number: int, client: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        entry = (number, next(self._numbers), client, turn)
        bisect.insort(self._queue, entry)
        try:
            await asyncio.wait_for(asyncio.shield(turn), self.wait_s)
        except BaseException as error:
            if turn.done():  # the turn came just then
                self._next()
            else:
                self._queue.remove(entry)
            if isinstance(error, TimeoutError | asyncio.TimeoutError):
                raise self._refusal(self.seconds * (1 + self.waiting / 2)) from None
            raise

    def _next(self) -> None:
        """Give a turn that is over to the question whose turn it is."""
        if self._queue:
            self._round, _, _, turn = self._queue.pop(0)
            turn.set_result(None)
        else:
            self._running -= 1

    def _refusal(self, seconds: float) -> HTTPException:
        after = max(1, math.ceil(seconds))
        return HTTPException(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"{self.waiting} questions to libraries wait, and none waits longer than "
            f"{self.wait_s:g} s; ask again in {after} s",
            headers={"Retry-After": str(after)},
        )
