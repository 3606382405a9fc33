"""What a store does by itself, in a thread: expiry, a look at the directory, changes of files.

A change of files takes as long as the disk does, and the store is called in the scheduler's thread.
So a rename and a deletion are operations that this thread carries out. Who asked for one
looks again until it is done.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lola_vllm.memory.sessions.catalog import Catalog
from lola_vllm.memory.sessions.directory import RESCAN_S
from lola_vllm.memory.sessions.file import StateFileError, StateHeader
from lola_vllm.memory.sessions.names import LIBRARY
from lola_vllm.memory.sessions.orders import DISK
from lola_vllm.memory.sessions.tiers import Stored

logger = logging.getLogger("vllm.lola")

# A state that is still being written is waited for so long.
WRITE_LIMIT_S = 60.0
POLL_S = 0.02
# Operations that wait, and finished ones whose result nobody has asked for yet.
MAX_OPERATIONS = 1000
# A file that could not be removed is tried again after so long.
RETRY_S = 60.0
# Fields of a header that servers change in a file.
_CHANGED = ("session", "turn", "kind", "tail")


@dataclass(eq=False)
class Operation:
    """A change of files.

    Attributes:
        states: whose files. answer: what to tell at its end.
        before: the headers before a change of some fields, by id; None: the states are deleted.
        fields: their new values. undo: whether they are set back if the files cannot be changed.
        done: whether it is over. error: why it failed, in words.
    """

    states: list[Stored]
    answer: Callable[[], Any] = dict
    before: dict[str, StateHeader] | None = None
    fields: dict[str, object] = field(default_factory=dict)
    undo: bool = True
    number: int = 0
    done: bool = False
    error: str | None = None


class Upkeep:
    """The thread of a store, which looks after its catalog."""

    def __init__(self, store: Catalog) -> None:
        self._store = store
        self._waiting: deque[Operation] = deque()
        self._known: OrderedDict[int, Operation] = OrderedDict()
        self._numbers = itertools.count(1)
        self._awake = threading.Event()
        self._stop = False
        self._stuck: set[str] = set()  # whose files could not be removed
        self._retried = time.monotonic()
        self.refresh()
        store.forget_orphans()
        self._thread = threading.Thread(target=self._run, name="lola-state-upkeep", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether no operation waits or runs."""
        with self._store.lock:
            return all(operation.done for operation in self._known.values())

    def rewrite(
        self,
        states: list[Stored],
        undo: bool = True,
        answer: Callable[[], object] = dict,
        **fields: object,
    ) -> Operation:
        """Give states other headers, now, and in their files, soon.

        Args:
            undo: whether a change that the files cannot take is taken back.
            answer: what is to be told at the end.
        """
        with self._store.lock:
            before = {state.id: state.header for state in states}
            operation = Operation(states, answer, before, dict(fields), undo)
            for state in states:
                self._store.change(state, **fields)
            self._submit(operation, any(DISK in state.tiers for state in states))
            return operation

    def delete(self, states: Sequence[Stored], answer: Callable[[], object] = dict) -> Operation:
        """Drop states everywhere and for good: those that have a file, or had one that another
        server may have read, once the files are gone and that is told to the others."""
        with self._store.lock:
            there = [state for state in states if DISK in state.tiers or state.written]
            for state in states:
                if not (DISK in state.tiers or state.written):
                    self._store.forget(state)
            operation = Operation(there, answer)
            self._submit(operation, bool(there))
            return operation

    def _submit(self, operation: Operation, needed: bool) -> None:
        """Carry out an operation; one that is not needed is over, as none of its states has a
        file."""
        store = self._store
        with store.lock:
            if not needed:
                operation.done = True
                return
            operation.number = next(self._numbers)
            if len(self._waiting) >= MAX_OPERATIONS:
                operation.done = True
                self._undo(operation, OSError(f"{MAX_OPERATIONS} changes wait: the disk is slow"))
                return
            self._known[operation.number] = operation
            while len(self._known) > 2 * MAX_OPERATIONS:
                self._known.popitem(last=False)
            self._waiting.append(operation)
        self._awake.set()

    def find(self, number: int) -> Operation | None:
        """An operation by its number; a finished one is found once."""
        with self._store.lock:
            operation = self._known.get(number)
            if operation is not None and operation.done:
                del self._known[number]
            return operation

    def close(self) -> None:
        """Finish what waits, and stop."""
        self._stop = True
        self._awake.set()
        self._thread.join(WRITE_LIMIT_S)

    def _run(self) -> None:
        while not self._stop or self._waiting:
            self._awake.wait(RESCAN_S)
            self._awake.clear()
            if self._store.waits_for_disk:  # an idle engine does not report by itself
                self._store.ask_for_outcomes()
            for work in (self._expire, self._look, self._operate):
                try:
                    work()
                except Exception:  # a file of whatever content must not end the thread
                    logger.exception("LoLA sessions: upkeep failed; it goes on")
                    self._store.count_failure("upkeep")

    def _expire(self) -> None:
        store, leaving = self._store, self._store.expire()
        if time.monotonic() - self._retried > RETRY_S:
            self._retried = time.monotonic()
            with store.lock:
                leaving += sorted(self._stuck)
                self._stuck.clear()
        for state in leaving:
            try:
                if store.directory is not None:
                    store.directory.unlink([state])
            except OSError as error:
                logger.warning("LoLA sessions: a state's file stays: %s", error)
                store.count_failure("io")
                self.remove_later(state)
        if store.has_orders:
            store.wake()

    def remove_later(self, state: str) -> None:
        """Try again to remove the files of a state, in a while."""
        with self._store.lock:
            self._stuck.add(state)

    def _look(self) -> None:
        directory = self._store.directory
        if directory is not None and directory.changed():
            self.refresh()

    def refresh(self) -> None:
        """Learn what other servers stored in the directory, and what they changed and removed."""
        store = self._store
        if store.directory is None:
            return
        with store.lock:
            settled = {i for i, s in store.disk.states.items() if len(s.written) == store.ranks}
            # These get a header of ours.
            busy = {s.id for op in self._known.values() if not op.done for s in op.states}
            before = {i: s.header for i, s in store.disk.states.items() if i not in busy}
            dropped = set(store.dropped)  # others are dropped while files are listed
            known = set(store.states) | dropped
        scan = store.directory.scan(known)
        if scan is None:
            return
        with store.lock:
            for reason, _ in scan.refused.values():
                store.count_failure(reason)
            if scan.partials:
                store.failures["partial"] += scan.partials
            self._forget_deleted([store.states[i] for i in scan.deleted & store.states.keys()])
            for header in scan.changed:
                state = store.states.get(header.id)
                if state is not None and state.header is before.get(header.id):
                    self._take_over(state, header)
            for gone in settled - scan.there:
                state = store.states.get(gone)
                if state is not None:
                    store.lose_file(state)
            store.dropped -= dropped - scan.there
            for header, used in sorted(scan.new, key=lambda found: found[1]):
                if header.id not in store.states and header.id not in store.dropped:
                    state = Stored(
                        header, store.state_bytes(header.num_tokens, bool(header.library)), used
                    )
                    state.written.update(range(store.ranks))
                    store.add(state, [store.disk])

    def _forget_deleted(self, states: Sequence[Stored]) -> None:
        """Another server deleted states. What was composed of them here for a request goes too."""
        for state in states:
            self._store.forget(state)
        made = self._store.made_of({state.header.session_id for state in states})
        self.delete([state for state in made if state.header.session.startswith(LIBRARY)])

    def _take_over(self, state: Stored, header: StateHeader) -> None:
        """Another server gave a state another header; one of another text is none of it."""
        if header.identity != state.header.identity:
            return
        theirs = {name: getattr(header, name) for name in _CHANGED}
        if any(getattr(state.header, name) != value for name, value in theirs.items()):
            self._store.change(state, **theirs)

    def _operate(self) -> None:
        while True:
            with self._store.lock:
                if not self._waiting:
                    return
                operation = self._waiting.popleft()
            try:
                self._carry_out(operation)
            except (OSError, StateFileError) as error:
                self._undo(operation, error)
            except Exception as error:
                self._undo(operation, error)
                raise
            finally:
                with self._store.lock:
                    operation.done = True
                    if operation.before is not None and not operation.undo:  # nobody asks
                        self._known.pop(operation.number, None)

    def _carry_out(self, operation: Operation) -> None:
        store, directory = self._store, self._store.directory
        assert directory is not None
        if operation.before is None:
            leaving = operation.states
            try:
                directory.delete([state.id for state in leaving])
            except OSError:
                leaving = [state for state in leaving if directory.gone(state.id)]
                raise
            finally:
                # Also what is being written at this moment: its mark and a `Drop` remove the file.
                for state in leaving:
                    store.forget(state)
                store.wake()
            return
        for state in operation.states:
            self._wait_for(state)
        with store.lock:
            headers = [s.header for s in operation.states if self._has_file(s)]
        directory.rewrite(headers)

    def _has_file(self, state: Stored) -> bool:
        return state.id in self._store.states and DISK in state.tiers

    def _wait_for(self, state: Stored) -> None:
        """Wait until a state is written, or is not to be any more."""
        directory, deadline = self._store.directory, time.monotonic() + WRITE_LIMIT_S
        assert directory is not None
        while self._has_file(state) and not directory.complete(state.id):
            if time.monotonic() > deadline:
                raise TimeoutError(f"its state is not written after {WRITE_LIMIT_S:.0f} s")
            self._store.ask_for_outcomes()
            time.sleep(POLL_S)

    def _undo(self, operation: Operation, error: Exception) -> None:
        store = self._store
        operation.error = f"{type(error).__name__}: {error}"
        logger.warning("LoLA sessions: files were not changed: %s", operation.error)
        store.count_failure("io" if isinstance(error, OSError) else "damaged")
        if operation.before is None or not operation.undo:
            return
        with store.lock:
            for state_id, before in operation.before.items():
                state = store.states.get(state_id)  # one that left may have been found again
                if state is not None:
                    store.change(state, **{
                        name: getattr(before, name)
                        for name, value in operation.fields.items()
                        if getattr(state.header, name) == value  # nobody changed it since
                    })  # fmt: skip
