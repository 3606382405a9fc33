"""The bytes of states on one rank: in memory, in files, and on their way between them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lola_vllm.memory.documents.keys import DocumentKeys
from lola_vllm.memory.documents.shelf import KeyShelf
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
    Drop,
    Load,
    Make,
    Order,
    Outcome,
    Save,
)
from lola_vllm.memory.sessions.prefix_hash import Tokens

logger = logging.getLogger("vllm.lola")

_FAILED: dict[type, str] = {Load: "load-failed", Drop: "drop-failed"}


def _no_composing(_rows: Sequence[Tensor], _lengths: Sequence[int]) -> Tensor:
    raise ValueError("this rank composes no states")


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
        clean: Callable[[Tensor, int], Tensor] = lambda row, _: row,
        max_waiting: int = 64,
        key: StateKey | None = None,
        compose: Callable[[Sequence[Tensor], Sequence[int]], Tensor] = _no_composing,
        shelf: KeyShelf | None = None,
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
        self._making: set[str] = set()  # states that are yet to be made of others
        self._reading: set[str] = set()  # states to keep in memory once they are read or made
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
            elif isinstance(order, Make):
                self._make(order)
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

    def document_keys(self, state: str, num_tokens: int, newest: int | None = None) -> DocumentKeys:
        """The keys of a library's document: kept, or taken from its state once more.

        Any thread may ask.

        Args:
            newest: of its tokens, how many at the end are asked for, whose keys are not kept.

        Raises:
            StateFileError, OSError: the state is no longer kept.
        """
        if self._shelf is None:
            raise FileNotFoundError("the keys of documents are not kept here")
        if newest is not None:
            return self._shelf.of_state(self._row(state), num_tokens, newest)
        found = self._shelf.find(state)
        if found is None:
            on_disk = self.directory is not None
            if self._in_memory(state) is not None:
                on_disk = on_disk and self._path(state).exists()
            found = self._shelf.add(state, self._row(state), num_tokens, on_disk)
        return found

    def _row(self, state: str) -> Tensor:
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
        elif self.directory is None and state not in self._making:
            self._report(state, "load-failed", MEMORY, None, "it is no longer kept", order.request)
        else:
            if order.keep:
                self._reading.add(state)
            # A file that is yet to be made is read after it is.
            thread = self._writer if state in self._making else self._reader
            thread.submit(self._read_file, order)

    def _put(self, order: Load, data: HostCopy, tier: str, began: float) -> None:
        data.copy_into(self.pool[order.state_index])
        self._done(order.header.id, "loaded", tier, began, order.request)

    def _make(self, order: Make) -> None:
        """Make a state in the writer's thread, where its sources are written or made before. A copy
        of what is in memory is there at once."""
        state = order.header.id
        data = [self._in_memory(source.id) for source in order.sources]
        if not order.composes and data[0] is not None:
            if order.memory:
                self._states[state] = data[0]
            if not order.disk:
                return
            if len(self._writing) + len(self._making) >= self.max_waiting:
                data = [None]  # a copy of the file takes no memory while it waits
        elif order.memory:
            self._reading.add(state)
        self._making.add(state)
        self._writer.submit(self._make_state, order, data)

    def _drop(self, order: Drop) -> None:
        if order.tier == MEMORY and order.state in self._making:
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
            self._write_row(header, tokens, data.wait())
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

    def _make_state(self, order: Make, held: Sequence[HostCopy | None]) -> None:
        began, state = time.monotonic(), order.header.id
        try:
            rows = []
            for source, data in zip(order.sources, held, strict=True):
                data = data or self._in_memory(source.id)  # it was made meanwhile
                if data is not None:
                    rows.append(data.wait())
                else:
                    found = self._from_file(source.id, with_rank(source, self.rank))
                    rows.append(torch.from_numpy(found.data))
            if order.composes:
                row = self._composed(rows, [source.num_tokens for source in order.sources])
            else:
                (row,) = rows
            if state in self._reading:  # nobody has dropped it
                self._reading.discard(state)
                self._states[state] = HostCopy(row)
                self._done(state, "saved", MEMORY, began)
            if order.disk:
                self._write_row(order.header, order.tokens, row)
                self._done(state, "saved", DISK, began)
        except Exception as error:
            self._reading.discard(state)
            only_the_file = order.disk and (state in self._states or not order.memory)
            self._report(state, "save-failed", DISK if only_the_file else MEMORY, error)
        finally:
            self._making.discard(state)

    def _write_row(self, header: StateHeader, tokens: Tokens, row: Tensor) -> None:
        row = self._clean(row, header.num_tokens)
        header = with_rank(header, self.rank)
        write_state(self._path(header.id), header, tokens, row.numpy(), self._key)

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
