"""A store and the ranks that carry out its orders, in this process and without vLLM."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from lola_vllm.memory.sessions.fingerprint import Fingerprint
from lola_vllm.memory.sessions.manager import SessionManager
from lola_vllm.memory.sessions.orders import Outcome, Save
from lola_vllm.memory.sessions.settings import StoreSettings
from lola_vllm.memory.sessions.store import SessionStore
from lola_vllm.memory.sessions.transfer import TransferWorker

FINGERPRINT = Fingerprint(
    config="config", tensors="tensors", dtype="float32", quantization="", layout="l", ranks="1x1"
)
ROW = 512
SECRET = "0123456789abcdef" * 4  # from which keys of files are derived


class Clock:
    """A clock that a test sets.

    Attributes:
        now: seconds since 1970. tick: that pass with each look, so that no two uses are at the same
            time; 0 where a test must not depend on how often the store looks.
    """

    def __init__(self) -> None:
        self.now, self.tick = 1_000_000.0, 0.001

    def __call__(self) -> float:
        """Seconds since 1970."""
        self.now += self.tick
        return self.now


class Server:
    """A store with one or more ranks, each with a pool of states.

    Attributes:
        running: those that are not closed yet.
    """

    running: ClassVar[list[Server]] = []

    def __init__(
        self,
        directory: Path | None = None,
        memory: int = 100 * ROW,
        disk: int = 1000 * ROW,
        ranks: int = 1,
        pool_size: int = 4,
        fingerprint: Fingerprint = FINGERPRINT,
        key_bytes: Callable[[int], int] = lambda _: 0,
        **settings: Any,
    ) -> None:
        self.clock = Clock()
        given = StoreSettings(memory, directory, disk, **{"store": "all", **settings})
        self.store = SessionStore(fingerprint, ROW, given, ranks, self.clock, key_bytes, offsets)
        self.pools = [torch.zeros(pool_size, ROW, dtype=torch.uint8) for _ in range(ranks)]
        path = None if directory is None else self.store.directory.path
        self.workers = [
            TransferWorker(
                pool, fingerprint, path, rank, ranks, key=given.key(), compose=composed_row
            )
            for rank, pool in enumerate(self.pools)
        ]
        self.manager = SessionManager(self.store)
        self.running.append(self)

    def step(self) -> list[Outcome]:
        """Deliver the orders, and return what the ranks have to say by now."""
        for order in self.store.take_orders():
            within = isinstance(order, Save) and order.within  # what layers copy inside of a step
            for worker, pool in zip(self.workers, self.pools, strict=True):
                worker.execute(order, pool[order.state_index] if within else None)
        found = []
        for rank, worker in enumerate(self.workers):
            worker.finish_loads()
            outcomes = worker.take_outcomes()
            self.store.apply((rank, outcome) for outcome in outcomes)
            found += outcomes
        return found

    def settle(self) -> list[Outcome]:
        """Steps until nothing is on its way."""
        found = self.step()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            # A job that does nothing: what was submitted before it is done.
            for worker in self.workers:
                worker._reader.submit(int).result()
                worker._writer.submit(int).result()
            more = self.step()
            if not more and not self.store.has_orders and self.store.upkeep.idle:
                return found
            found += more
        raise TimeoutError("the store does not settle")

    def ask(self, method: str, **arguments: Any) -> Any:
        """What a method of the manager answers in the end, as a route would be told."""
        answer = self.manager.call(method, arguments)
        deadline = time.monotonic() + 20
        while isinstance(answer, dict) and "operation" in answer:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{method} does not end")
            time.sleep(0.005)
            self.step()
            answer = self.manager.call("result", answer)
        return answer

    def say(
        self, tokens: list[int], session: str | None = None, *, kind: str = "answer", **kwargs: Any
    ) -> Any:
        """Store the state after some tokens: a row that depends on them alone."""
        salt, adapter = kwargs.pop("salt", ""), kwargs.pop("adapter", "")
        hashes = self.store.prefix_hashes(tokens, adapter, salt)
        parent = self.store.find(hashes, len(tokens) - 1)
        turn = self.store.open_turn(session, parent, salt)
        for rank, pool in enumerate(self.pools):
            pool[1] = row_of(tokens, rank)
        state, new = self.store.save(
            turn, hashes, len(tokens), kind, 1, adapter=adapter, parent=parent, **kwargs
        )
        self.step()
        return state if new else (state, "was there")

    def tell(self, tokens: list[int], session: str | None = None, **kwargs: Any) -> Any:
        """As `say`, until the state has reached all its places."""
        told = self.say(tokens, session, **kwargs)
        self.settle()
        return told

    def restore(self, tokens: list[int], **kwargs: Any) -> int:
        """Tokens that a prompt need not compute, after a check of the rows that were loaded."""
        state = self.store.find(self.store.prefix_hashes(tokens, **kwargs), len(tokens) - 1)
        if state is None:
            return 0
        self.store.load(state, 2, "request")
        outcomes = self.settle()
        if any(outcome.event == "load-failed" for outcome in outcomes):
            return 0
        assert sum(outcome.event == "loaded" for outcome in outcomes) == len(self.pools)
        n = state.header.num_tokens
        for rank, pool in enumerate(self.pools):
            assert pool[2].equal(row_of(tokens[:n], rank))
        return n

    def close(self) -> None:
        """As at the end of a server."""
        for worker in self.workers:
            worker.close()
        self.store.close()
        if self in self.running:
            self.running.remove(self)


def names(server: Server) -> set[str]:
    """The sessions of all owners."""
    server.store.expire()
    return {name for _, name in server.store.sessions}


def offsets(lengths: Sequence[int]) -> list[int]:
    """Documents begin at multiples of 8, and all but the last have 8 tokens or more."""
    if any(n < 8 for n in lengths[:-1]):
        raise ValueError("a document is too short")
    return [sum(n // 8 * 8 for n in lengths[:i]) for i in range(len(lengths))]


def composed_row(rows: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
    """A row that depends on the rows, their lengths and their order."""
    total = torch.zeros(ROW, dtype=torch.uint8)
    for row, n in zip(rows, lengths, strict=True):
        total = total * 3 + row + n % 256
    return total


def size_of(num_tokens: int) -> int:
    """Bytes of a state on one rank."""
    return ROW + 4 * num_tokens


def row_of(tokens: list[int], rank: int = 0) -> torch.Tensor:
    """A row `[ROW]` of bytes that stands for the state after some tokens."""
    gen = torch.Generator().manual_seed(hash((rank, *tokens)) & 0x7FFFFFFF)
    return torch.randint(0, 256, (ROW,), dtype=torch.uint8, generator=gen)
