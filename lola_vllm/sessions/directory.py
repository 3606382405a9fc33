"""The files of a store: what is there, and what other servers put there or took away."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lola_vllm.sessions.file import (
    StateFileError,
    StateHeader,
    file_name,
    parse_name,
    read_header,
    remove_partials,
)
from lola_vllm.sessions.fingerprint import Fingerprint

logger = logging.getLogger("vllm.lola")

RESCAN_S = 1.0


@dataclass
class Scan:
    """What a look at the directory found.

    Attributes:
        there: states whose files are complete, of all ranks. new: those of them that were not
            known, with the time of their last use. refused: file name -> (reason, text) of new
            files that cannot be used.
    """

    there: set[str] = field(default_factory=set)
    new: list[tuple[StateHeader, float]] = field(default_factory=list)
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)


class StateDirectory:
    """The files of one model in a directory that several servers may share.

    No lock is held: files appear complete and disappear at once. A file's time of change is that of
    its last use, so servers agree on what was used least.

    Raises:
        OSError: the directory cannot be made or written to.
    """

    def __init__(self, root: Path, fingerprint: Fingerprint, ranks: int = 1) -> None:
        self.path = model_directory(root, fingerprint)
        self.fingerprint = fingerprint
        self.ranks = ranks
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.chmod(0o700)
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(f"{self.path}: cannot be written to")
        remove_partials(self.path)
        self._refused: dict[str, int] = {}
        self._stamp: int | None = None
        self._lock = threading.Lock()

    def files(self, state: str) -> list[Path]:
        """The files of a state, one per rank."""
        return [self.path / file_name(state, rank, self.ranks) for rank in range(self.ranks)]

    def changed(self) -> bool:
        """Whether a file came or went since the last scan; False where the directory is gone."""
        try:
            return self.path.stat().st_mtime_ns != self._stamp
        except OSError:
            return False

    def scan(self, known: set[str]) -> Scan | None:
        """Look at the directory; None where it cannot be read.

        Args:
            known: states whose headers need not be read again.
        """
        with self._lock:
            try:
                stamp = self.path.stat().st_mtime_ns
                names = set(os.listdir(self.path))
            except OSError as error:
                logger.warning("LoLA sessions: %s cannot be read: %s", self.path, error)
                return None
            found = Scan()
            for name in sorted(names):
                parts = parse_name(name)
                if parts is None or parts[1] != 0 or parts[2] != self.ranks:
                    continue
                state = parts[0]
                if not all(path.name in names for path in self.files(state)):
                    continue
                if state in known:
                    found.there.add(state)
                else:
                    self._look_at(state, found)
            self._stamp = stamp
        return found

    def use(self, state: str) -> None:
        """Note that a state was used."""
        for path in self.files(state):
            with suppress(OSError):
                os.utime(path)

    def _look_at(self, state: str, found: Scan) -> None:
        path = self.files(state)[0]
        try:
            stat = path.stat()
            if self._refused.get(path.name) == stat.st_mtime_ns:
                return
            header = self._checked(path, state)
        except StateFileError as error:
            if error.reason != "missing":
                self._refused[path.name] = stat.st_mtime_ns
                found.refused[path.name] = (error.reason, error.text)
                logger.warning("LoLA sessions: %s is not used: %s", path, error.text)
            return
        except OSError:  # another server removed it a moment ago
            return
        found.there.add(state)
        found.new.append((header, stat.st_mtime))

    def _checked(self, path: Path, state: str) -> StateHeader:
        header = read_header(path)
        if (header.id, header.rank, header.ranks) != (state, 0, self.ranks):
            raise StateFileError(path, "foreign", "it was renamed: the header has another id")
        difference = self.fingerprint.difference(header.fingerprint)
        if difference:
            raise StateFileError(path, "foreign", difference)
        return header


def model_directory(root: Path, fingerprint: Fingerprint) -> Path:
    """Where the states of a model are."""
    return root / fingerprint.key[:24]
