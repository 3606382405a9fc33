"""The files of a store: what is there, and what other servers put there, changed or took away.

A state that somebody deletes leaves an empty file `ID.deleted` for a while. Servers that share the
directory see in it that the state is to go from their memory too. A file that a write under way
leaves after the deletion is removed at the next look, so no state comes back.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lola_vllm.memory.sessions.cipher import StateKey
from lola_vllm.memory.sessions.file import (
    KEYS_SUFFIX,
    StateFileError,
    StateHeader,
    file_name,
    keys_file,
    parse_name,
    rank_files,
    read_ahead,
    read_header,
    read_state,
    with_rank,
    write_state,
)
from lola_vllm.memory.sessions.fingerprint import Fingerprint
from lola_vllm.memory.sessions.partial import aside, is_partial, remove_partials

logger = logging.getLogger("vllm.lola")

RESCAN_S = 1.0
# Scans of a large directory take at most about this share of the time.
SCAN_SHARE = 0.05
DELETED = ".deleted"
# For so long the mark of a deletion stays: longer than any write takes.
DELETED_S = 3600.0


@dataclass
class Scan:
    """What a look at the directory found.

    Attributes:
        there: states whose files are complete, of all ranks. new: those of them that were not
            known, with the time of their last use. changed: new headers of those that were known.
            deleted: states that somebody deleted. refused: file name -> (reason, text) of new
            files that cannot be used. partials: what killed writers left, which is removed.
    """

    there: set[str] = field(default_factory=set)
    new: list[tuple[StateHeader, float]] = field(default_factory=list)
    changed: list[StateHeader] = field(default_factory=list)
    deleted: set[str] = field(default_factory=set)
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)
    partials: int = 0


class StateDirectory:
    """The files of one model in a directory that several servers may share.

    No lock is held: files appear complete and disappear at once. A file's time of change is that of
    its last use, so servers agree on what was used least.

    Args:
        path: `model_directory`. fingerprint: of the model; None: files are not read.
        key: of the files; None: they are not encrypted. Others are not used, and stay.

    Raises:
        OSError: the directory cannot be made or written to.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Fingerprint | None,
        ranks: int = 1,
        key: StateKey | None = None,
    ) -> None:
        self.path, self.fingerprint, self.ranks, self.key = path, fingerprint, ranks, key
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.chmod(0o700)
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(f"{self.path}: cannot be written to")
        self._refused: dict[str, int] = {}
        self._inodes: dict[str, int] = {}  # of the files whose headers were read
        self._stamp: int | None = None
        self._rests_until = 0.0
        self._lock = threading.Lock()

    def files(self, state: str) -> list[Path]:
        """The files of a state, one per rank."""
        return rank_files(self.path, state, self.ranks)

    def changed(self) -> bool:
        """Whether a file came or went since the last scan; False where the directory is gone.

        False also shortly after a scan that took long, so that scans take a small share of a core.
        """
        if time.monotonic() < self._rests_until:
            return False
        try:
            return self.path.stat().st_mtime_ns != self._stamp
        except OSError:
            return False

    def scan(self, known: set[str]) -> Scan | None:
        """Look at the directory; None where it cannot be read.

        Args:
            known: states whose headers are read again only where their file is another one.
        """
        began = time.monotonic()
        with self._lock:
            try:
                stamp = self.path.stat().st_mtime_ns
                with os.scandir(self.path) as entries:
                    inodes = {entry.name: entry.inode() for entry in entries}
            except OSError as error:
                logger.warning("LoLA sessions: %s cannot be read: %s", self.path, error)
                return None
            found = Scan()
            found.deleted = {n.removesuffix(DELETED) for n in inodes if n.endswith(DELETED)}
            if any(map(is_partial, inodes)):
                found.partials = remove_partials(self.path)
            self._remove_keys(inodes)
            self._inodes = {name: i for name, i in self._inodes.items() if name in inodes}
            unread = []
            for name in sorted(inodes):
                parts = parse_name(name)
                if parts is None or parts[1] != 0 or parts[2] != self.ranks:
                    continue
                state = parts[0]
                names = (file_name(state, rank, self.ranks) for rank in range(1, self.ranks))
                if not all(other in inodes for other in names):
                    continue
                if state in found.deleted:  # it was being written, or could not be removed
                    with suppress(OSError):
                        self.unlink([state])
                elif state not in known or self._inodes.get(name) != inodes[name]:
                    unread.append(state)
                else:
                    found.there.add(state)
            if len(unread) > 1:
                read_ahead([self.files(state)[0] for state in unread])
            for state in unread:
                self._look_at(state, state in known, found)
            self._forget_deletions(found.deleted)
            self._stamp = stamp
            self._rests_until = time.monotonic() + (time.monotonic() - began) / SCAN_SHARE
        self._tell(found.refused)
        return found

    def use(self, state: str) -> None:
        """Note that a state was used."""
        for path in self.files(state):
            with suppress(OSError):
                os.utime(path)

    def complete(self, state: str) -> bool:
        """Whether the files of all ranks are there."""
        return all(path.exists() for path in self.files(state))

    def gone(self, state: str) -> bool:
        """Whether no rank's file is there."""
        return not any(path.exists() for path in self.files(state))

    def rewrite(self, headers: Sequence[StateHeader]) -> None:
        """Give states other headers in their files, all of them or, where one fails, none.

        All new files are written aside before the first takes its place, so a full disk changes
        nothing. The first rank's file is the one that is looked at, so it is replaced last.

        Raises:
            OSError: a file cannot be written. StateFileError: or cannot be read.
        """
        ready: list[tuple[Path, Path]] = []
        try:
            for header in headers:
                for rank, path in reversed(list(enumerate(self.files(header.id)))):
                    there = with_rank(header, rank)
                    found = read_state(path, self.fingerprint, self.key, expected=there)
                    new = aside(path)
                    ready.append((new, path))
                    write_state(new, there, found.tokens, found.data, self.key)
            for new, path in ready:
                new.replace(path)
            self._sync()
        finally:
            for new, _ in ready:
                new.unlink(missing_ok=True)

    def delete(self, states: Iterable[str]) -> None:
        """Remove states for good: they do not come back, whatever happens next.

        Raises:
            OSError: a file cannot be removed. It is then still there, and not marked as deleted.
        """
        states = list(states)
        marks = [self._mark(state) for state in states]
        try:
            for mark in marks:
                with suppress(OSError):  # a full disk must not keep what is to be deleted
                    os.close(os.open(mark, os.O_CREAT | os.O_WRONLY, 0o600))
            self._sync()
            self.unlink(states)
            self._sync()
        except OSError:
            for state, mark in zip(states, marks, strict=True):
                if not self.gone(state):
                    with suppress(OSError):
                        mark.unlink()
            raise

    def unlink(self, states: Iterable[str]) -> None:
        """Remove the files of states; all are tried.

        Raises:
            OSError: of the first that is still there.
        """
        failed = None
        for state in states:
            for path in (*self.files(state), keys_file(self.path, state)):
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    failed = failed or error
        if failed is not None:
            raise failed

    def _remove_keys(self, names: Iterable[str]) -> None:
        """Remove keys that a killed server left without their state."""
        files = set(names)
        for name in files:
            state = name.removesuffix(KEYS_SUFFIX)
            if state != name and file_name(state, 0, self.ranks) not in files:
                with suppress(OSError):
                    path = self.path / name
                    if time.time() - path.stat().st_mtime > DELETED_S:
                        path.unlink()

    def _mark(self, state: str) -> Path:
        return self.path / f"{state}{DELETED}"

    def _sync(self) -> None:
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _forget_deletions(self, states: set[str]) -> None:
        """Remove marks that nobody waits for any more."""
        for state in states:
            with suppress(OSError):
                mark = self._mark(state)
                if time.time() - mark.stat().st_mtime > DELETED_S:
                    self.unlink([state])
                    mark.unlink()

    def _look_at(self, state: str, known: bool, found: Scan) -> None:
        path = self.files(state)[0]
        try:
            stat = path.stat()
            if self._refused.get(path.name) == stat.st_mtime_ns:
                return
            header = self._checked(path)
        except OSError:  # another server removed it a moment ago
            return
        except Exception as error:  # one file of whatever content must not hide the others
            reason, text = "damaged", f"{type(error).__name__}: {error}"
            if isinstance(error, StateFileError):
                reason, text = error.reason, error.text
            if reason == "missing":
                return
            if known:  # whoever loads it finds out
                found.there.add(state)
                return
            self._refused[path.name] = stat.st_mtime_ns
            found.refused[path.name] = (reason, text)
            return
        self._inodes[path.name] = stat.st_ino
        found.there.add(state)
        if known:
            found.changed.append(header)
        else:
            found.new.append((header, stat.st_mtime))

    def _tell(self, refused: Mapping[str, tuple[str, str]]) -> None:
        """Log what is not used: a line per reason, as a directory may have been given a key."""
        for reason in dict.fromkeys(reason for reason, _ in refused.values()):
            names = [name for name, (other, _) in refused.items() if other == reason]
            logger.warning(
                "LoLA sessions: %s, one of %d files in %s: not used (%s): %s",
                names[0], len(names), self.path, reason, refused[names[0]][1],
            )  # fmt: skip

    def _checked(self, path: Path) -> StateHeader:
        header = read_header(path, self.key)
        assert self.fingerprint is not None  # where files are read
        difference = self.fingerprint.difference(header.fingerprint)
        if difference:
            raise StateFileError(path, "foreign", difference)
        return header


def model_directory(root: Path, fingerprint: Fingerprint) -> Path:
    """Where the states of a model are."""
    return root / fingerprint.key[:24]
