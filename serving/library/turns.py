"""Questions to libraries take turns: few are asked at once, and clients wait equally long.

A question is heard alone, and documents are looked for in one thread. So questions wait here, where
that costs nothing, and not in the engine. Who would wait longer than `WAIT_S` is told at once when
to come again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
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
        # By client, and those who waited longest first.
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Questions that wait."""
        return sum(map(len, self._waiting.values()))

    def check(self, client: str) -> None:
        """Refuse a question that would wait too long.

        Raises:
            HTTPException: 429, with the seconds after which to ask again.
        """
        if self._running < self.at_once:
            return
        own = len(self._waiting.get(client, ()))
        others = (len(q) for name, q in self._waiting.items() if name != client)
        # Of each other client, as many questions come before as of this one, and one more.
        before = own + sum(min(count, own + 1) for count in others)
        wait = (before + 1) * self.seconds
        if wait > self.wait_s:
            raise self._refusal(wait - self.wait_s)

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """A turn, which is over with the context.

        Raises:
            HTTPException: as `check`, now or after `wait_s`.
        """
        self.check(client)
        if self._running < self.at_once:
            self._running += 1
        else:
            await self._wait(client)  # who ends gives the turn on
        began = time.monotonic()
        try:
            yield
        finally:
            took = (time.monotonic() - began) / self.at_once
            self.seconds = took if not self.seconds else (
                (1 - NEWEST) * self.seconds + NEWEST * took
            )  # fmt: skip
            self._next()

    async def _wait(self, client: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await asyncio.wait_for(asyncio.shield(turn), self.wait_s)
        except BaseException as error:
            if turn.done():  # the turn came just then
                self._next()
            else:
                self._leave(client, turn)
            if isinstance(error, TimeoutError):
                raise self._refusal(self.seconds * (1 + self.waiting / 2)) from None
            raise

    def _leave(self, client: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting[client]
        queue.remove(turn)
        if not queue:
            del self._waiting[client]

    def _next(self) -> None:
        """Give a turn that is over to the client that waited longest for its next one."""
        if not self._waiting:
            self._running -= 1
            return
        client, queue = next(iter(self._waiting.items()))
        turn = queue.popleft()
        if queue:
            self._waiting.move_to_end(client)
        else:
            del self._waiting[client]
        turn.set_result(None)

    def _refusal(self, seconds: float) -> HTTPException:
        after = max(1, math.ceil(seconds))
        return HTTPException(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"{self.waiting} questions to libraries wait, and none waits longer than "
            f"{self.wait_s:g} s; ask again in {after} s",
            headers={"Retry-After": str(after)},
        )
