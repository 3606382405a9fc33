"""The bytes of states on one rank: in memory, in files, and on their way between them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lola_vllm.memory.sessions.cipher import StateKey
from lola_vllm.memory.sessions.file import (
    State,
    StateFileError,
    StateHeader,
    file_name,
    keys_file,
    read_state,
    with_rank,
    write_state,
)
from lola_vllm.memory.sessions.fingerprint import Fingerprint
from lola_vllm.memory.sessions.host_copy import HostCopy, copy_to_host
from lola_vllm.memory.sessions.orders import (
    DISK,
    MEMORY,
    Compose,
    Copy,
    Drop,
    Load,
    Order,
    Outcome,
    Save,
)
from lola_vllm.memory.sessions.prefix_hash import Tokens

logger = logging.getLogger("vllm.lola")

_FAILED: dict[type, str] = {Load: "load-failed", Drop: "drop-failed"}


class Shelf(Protocol):
    """Where the keys of documents are kept (`memory/documents/shelf.py`). Used by several
    threads."""

    def add(self, state: str, row: Tensor, num_tokens: int, disk: bool) -> object:
        """Take those of a state `[rank_bytes]` after so many tokens; in a file where it has one."""

    def newest(self, row: Tensor, num_tokens: int, count: int) -> object:
        """Those of so many tokens at the end of a text."""

    def find(self, state: str) -> object | None:
        """Those of a state; None where they are not kept."""

    def drop(self, state: str) -> None:
        """Forget what is in memory."""


class TransferWorker:
    """Carries out the orders of a store on one rank.

    Orders come from one thread. Files are read and written by two others.

    Args:
        pool: the rank's states `[num_blocks, rank_bytes]` of bytes.
        fingerprint: of the model. directory: for files; None: no files.
        clean: a copy of a state whose bytes that are not valid after n tokens are zero; such bytes
            may be of other people's texts.
        max_waiting: states that wait to be written. More are not written: a slow disk must not
            fill the memory.
        key: to encrypt files with; None: they are not encrypted.
        compose: the state of documents one behind the other, from theirs and their tokens.
        shelf: for the keys of a library's documents; None: there are none.
    """

    def __init__(
        self,
        pool: Tensor,
        fingerprint: Fingerprint,
        directory: Path | None = None,
        rank: int = 0,
        ranks: int = 1,
        clean: Callable[[Tensor, int], Tensor] | None = None,
        max_waiting: int = 64,
        key: StateKey | None = None,
        compose: Callable[[Sequence[Tensor], Sequence[int]], Tensor] | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.pool = pool.view(torch.uint8)
        self.fingerprint = fingerprint
        self.directory = directory
        self.rank, self.ranks = rank, ranks
        self._clean = clean
        self.max_waiting = max_waiting
        self._key = key
        self._composed = compose
        self._shelf = shelf
        self._states: dict[str, HostCopy] = {}
        self._writing: dict[str, list[HostCopy]] = {}  # an entry per write that waits
        self._copying: set[str] = set()  # states whose file is yet to be made of another
        self._reading: set[str] = set()  # states to keep in memory once they are read
        self._read: list[tuple[Load, HostCopy, float]] = []
        self._outcomes: list[Outcome] = []
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, "lola-state-writer")
        self._reader = ThreadPoolExecutor(1, "lola-state-reader")

    @property
    def num_states(self) -> int:
        """States in memory."""
        return len(self._states)

    @property
    def num_waiting(self) -> int:
        """States that are yet to be written."""
        return len(self._writing)

    def execute(self, order: Order, row: Tensor | None = None) -> None:
        """Carry out an order, or start to. Never raises: a failure is an outcome.

        Args:
            row: `[rank_bytes]`, what was copied for a `Save.within`; None: nothing was.
        """
        try:
            if isinstance(order, Save):
                self._save(order, row)
            elif isinstance(order, Load):
                self._load(order)
            elif isinstance(order, Copy):
                self._copy(order)
            elif isinstance(order, Compose):
                self._compose(order)
            else:
                self._drop(order)
        except Exception as error:  # of the device or of a file system
            logger.warning("LoLA sessions: %s: %s", type(order).__name__, error)
            request = getattr(order, "request", "")
            event = _FAILED.get(type(order), "save-failed")
            tier = DISK if isinstance(order, Drop) else MEMORY
            self._report(order_state(order), event, tier, error, request=request)

    def finish_loads(self) -> None:
        """Put states that were read from files into the pool."""
        with self._lock:
            ready, self._read = self._read, []
        for order, data, began in ready:
            if order.header.id in self._reading:
                self._reading.discard(order.header.id)
                self._states[order.header.id] = data
            self._put(order, data, DISK, began)

    def take_outcomes(self) -> list[Outcome]:
        """What happened since the last call."""
        with self._lock:
            found, self._outcomes = self._outcomes, []
        return found

    def close(self) -> None:
        """Write what waits, and stop the threads."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)
        self._states.clear()

    def _save(self, order: Save, row: Tensor | None) -> None:
        began = time.monotonic()
        if not order.within:
            row = self.pool[order.state_index]
        if row is None:
            raise ValueError(f"the step did not copy the state after {order.header.num_tokens}")
        data = HostCopy(row) if order.within and row.is_cpu else copy_to_host(row)
        state = order.header.id
        if order.memory:
            self._states[state] = data
        self._done(state, "saved", MEMORY, began, order.request)
        if order.disk:
            self._write(order.header, order.tokens, data)
        if order.header.library and self._shelf is not None:
            self._writer.submit(self._take_keys, order.header, data, order.disk)

    def document_keys(self, state: str, num_tokens: int) -> object:
        """The keys of a library's document: kept, or taken from its state once more.

        Any thread may ask.

        Raises:
            StateFileError, OSError: the state is no longer kept.
        """
        if self._shelf is None:
            raise FileNotFoundError("the keys of documents are not kept here")
        found = self._shelf.find(state)
        if found is None:
            on_disk = self.directory is not None
            if self._in_memory(state) is not None:
                on_disk = on_disk and self._path(state).exists()
            found = self._shelf.add(state, self._row(state), num_tokens, on_disk)
        return found

    def newest_keys(self, state: str, num_tokens: int, count: int) -> object:
        """The keys of so many tokens at the end of what a state has seen; as `document_keys`."""
        if self._shelf is None:
            raise FileNotFoundError("the keys of documents are not kept here")
        return self._shelf.newest(self._row(state), num_tokens, count)

    def _row(self, state: str) -> Tensor:
        """A state's bytes, from memory or its file."""
        data = self._in_memory(state)
        if data is not None:
            return data.wait()
        return torch.from_numpy(self._from_file(state).data)

    def _from_file(self, state: str, expected: StateHeader | None = None) -> State:
        """A state from its file. One that cannot be used is reported, and then not kept."""
        try:
            return read_state(self._path(state), self.fingerprint, self._key, expected=expected)
        except StateFileError as error:
            self._report(state, "read-failed", DISK, error)
            raise

    def _load(self, order: Load) -> None:
        state = order.header.id
        data = self._in_memory(state)
        if data is not None:
            self._put(order, data, MEMORY, time.monotonic())
        elif self.directory is None and state not in self._copying:
            self._report(state, "load-failed", MEMORY, None, "it is no longer kept", order.request)
        else:
            if order.keep:
                self._reading.add(state)
            # A file that is yet to be made is read after it is.
            thread = self._writer if state in self._copying else self._reader
            thread.submit(self._read_file, order)

    def _put(self, order: Load, data: HostCopy, tier: str, began: float) -> None:
        data.copy_into(self.pool[order.state_index])
        self._done(order.header.id, "loaded", tier, began, order.request)

    def _copy(self, order: Copy) -> None:
        state = order.header.id
        if order.source in self._copying:  # in the writer's thread, where it is made before
            if order.memory:
                self._reading.add(state)
            self._copying.add(state)
            self._writer.submit(self._copy_made, order)
            return
        data = self._in_memory(order.source)
        if data is not None:
            if order.memory:
                self._states[state] = data
            if order.disk and order.tokens is not None and not self._better_from_file(order):
                self._write(order.header, order.tokens, data)
                return
        if order.disk:  # read and written in the order of the writes before it
            self._copying.add(state)
            self._writer.submit(self._copy_file, order)

    def _compose(self, order: Compose) -> None:
        state = order.header.id
        sources = [self._in_memory(source.id) for source in order.sources]
        if order.memory:
            self._reading.add(state)
        self._copying.add(state)
        self._writer.submit(self._compose_states, order, sources)

    def _better_from_file(self, order: Copy) -> bool:
        """Whether too many wait to be written, and the source has a file, or will by then: a copy
        of it takes no memory while it waits."""
        if len(self._writing) < self.max_waiting:
            return False
        return order.source in self._writing or self._path(order.source).exists()

    def _drop(self, order: Drop) -> None:
        if order.tier == MEMORY and order.state in self._copying:
            # After what is made of it, in the same thread.
            self._writer.submit(self._forget, order.state)
            return
        if order.tier == MEMORY:
            self._forget(order.state)
            return
        self._writing.pop(order.state, None)
        # After the write that may be going on, in the same thread.
        self._writer.submit(self._unlink, order.state)

    def _forget(self, state: str) -> None:
        self._states.pop(state, None)
        self._reading.discard(state)
        if self._shelf is not None:
            self._shelf.drop(state)

    def _write(self, header: StateHeader, tokens: Tokens, data: HostCopy) -> None:
        if len(self._writing) >= self.max_waiting:
            text = f"{self.max_waiting} states wait to be written: the disk is too slow"
            self._report(header.id, "save-failed", DISK, None, text, fault="slow")
            return
        with self._lock:
            self._writing.setdefault(header.id, []).append(data)
        self._writer.submit(self._write_file, header, tokens)

    def _in_memory(self, state: str) -> HostCopy | None:
        return self._states.get(state) or next(iter(self._writing.get(state, ())), None)

    # In the writer's thread.

    def _write_file(self, header: StateHeader, tokens: Tokens) -> None:
        waiting = self._writing.get(header.id)
        if waiting is None:  # dropped meanwhile
            return
        data = waiting[0]
        began = time.monotonic()
        try:
            host = data.wait()
            if self._clean is not None:
                host = self._clean(host, header.num_tokens)
            path, header = self._path(header.id), with_rank(header, self.rank)
            write_state(path, header, tokens, host.numpy(), self._key)
            self._done(header.id, "saved", DISK, began)
        except Exception as error:
            self._report(header.id, "save-failed", DISK, error)
        finally:
            with self._lock:
                waiting.pop(0)
                if not waiting and self._writing.get(header.id) is waiting:
                    del self._writing[header.id]

    def _take_keys(self, header: StateHeader, data: HostCopy, disk: bool) -> None:
        try:
            assert self._shelf is not None
            if header.id in self._states or self._path(header.id).exists():  # not dropped meanwhile
                self._shelf.add(header.id, data.wait(), header.num_tokens, disk)
        except Exception as error:  # they are taken again when a question needs them
            logger.warning("LoLA sessions: the keys of a document were not kept: %s", error)

    def _copy_file(self, order: Copy) -> None:
        began = time.monotonic()
        try:
            header = with_rank(order.header, self.rank)  # of the same text, for the same owner
            found = self._from_file(order.source, replace(header, id=order.source))
            write_state(self._path(header.id), header, found.tokens, found.data, self._key)
            self._done(header.id, "saved", DISK, began)
        except Exception as error:
            self._report(order.header.id, "save-failed", DISK, error)
        finally:
            self._copying.discard(order.header.id)

    def _copy_made(self, order: Copy) -> None:
        """Copy a state that was made in this thread."""
        state, data = order.header.id, self._in_memory(order.source)
        try:
            if data is not None and order.memory and state in self._reading:
                self._states[state] = data
            if data is not None and order.disk and order.tokens is not None:
                with self._lock:
                    self._writing.setdefault(state, []).append(data)
                self._write_file(order.header, order.tokens)
            elif order.disk:
                self._copy_file(order)
            elif data is None:
                text = "what it is a copy of could not be made"
                self._report(state, "save-failed", MEMORY, None, text)
        finally:
            self._reading.discard(state)
            self._copying.discard(state)

    def _compose_states(self, order: Compose, sources: Sequence[HostCopy | None]) -> None:
        began = time.monotonic()
        header = with_rank(order.header, self.rank)
        try:
            if self._composed is None:
                raise ValueError("this rank composes no states")
            made = (self._in_memory(source.id) for source in order.sources)  # composed meanwhile
            sources = [data or other for data, other in zip(sources, made, strict=True)]
            rows = [
                torch.from_numpy(self._from_file(source.id, with_rank(source, self.rank)).data)
                if data is None
                else data.wait()
                for source, data in zip(order.sources, sources, strict=True)
            ]
            row = self._composed(rows, [source.num_tokens for source in order.sources])
            if header.id in self._reading:  # nobody has dropped it
                self._reading.discard(header.id)
                self._states[header.id] = HostCopy(row)
                self._done(header.id, "saved", MEMORY, began)
            if order.disk:
                write_state(self._path(header.id), header, order.tokens, row.numpy(), self._key)
                self._done(header.id, "saved", DISK, began)
        except Exception as error:
            self._reading.discard(header.id)
            if order.disk and header.id in self._states:
                self._report(header.id, "save-failed", DISK, error)
            else:
                self._report(header.id, "save-failed", MEMORY, error)
        finally:
            self._copying.discard(header.id)

    def _unlink(self, state: str) -> None:
        try:
            path = self._path(state)
            path.unlink(missing_ok=True)
            if self._shelf is not None:
                self._shelf.drop(state)
                keys_file(path.parent, state).unlink(missing_ok=True)
        except OSError as error:
            self._report(state, "drop-failed", DISK, error)

    # In the reader's thread.

    def _read_file(self, order: Load) -> None:
        began = time.monotonic()
        try:
            data = self._in_memory(order.header.id)  # composed meanwhile
            if data is not None:
                with self._lock:
                    self._read.append((order, data, began))
                return
            path, expected = self._path(order.header.id), with_rank(order.header, self.rank)
            found = read_state(path, self.fingerprint, self._key, expected=expected)
            if len(found.data) != self.pool.shape[1]:
                raise StateFileError(
                    path, "foreign", f"{len(found.data)} bytes of pages, {self.pool.shape[1]} here"
                )
            with self._lock:
                self._read.append((order, HostCopy(torch.from_numpy(found.data)), began))
        except Exception as error:
            self._reading.discard(order.header.id)
            self._report(order.header.id, "load-failed", DISK, error, request=order.request)

    def _path(self, state: str) -> Path:
        if self.directory is None:
            raise FileNotFoundError("the store has no directory")
        return self.directory / file_name(state, self.rank, self.ranks)

    def _done(self, state: str, event: str, tier: str, began: float, request: str = "") -> None:
        seconds = time.monotonic() - began
        with self._lock:
            self._outcomes.append(Outcome(state, event, tier, request, seconds=seconds))

    def _report(
        self,
        state: str,
        event: str,
        tier: str,
        error: Exception | None,
        text: str = "",
        request: str = "",
        fault: str = "missing",
    ) -> None:
        if isinstance(error, StateFileError):
            text, fault = error.text, error.reason
        elif error is not None:
            text, fault = f"{type(error).__name__}: {error}", "io"
        outcome = Outcome(state, event, tier, request, text, fault)
        with self._lock:
            self._outcomes.append(outcome)


def order_state(order: Order) -> str:
    """The state that an order is about."""
    return order.state if isinstance(order, Drop) else order.header.id
