"""A state directory by owners, for its operator: what each has, and deleting it.

No server has to run.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lola_vllm.memory.sessions.cipher import StateKey
from lola_vllm.memory.sessions.directory import DELETED, StateDirectory, model_directory
from lola_vllm.memory.sessions.file import (
    StateFileError,
    StateHeader,
    parse_name,
    rank_files,
    read_ahead,
    read_header,
)
from lola_vllm.memory.sessions.fingerprint import Fingerprint
from lola_vllm.memory.sessions.owner import key_owner

_MODEL = re.compile(r"[0-9a-f]{24}")


class InventoryError(ValueError):
    """A request that cannot be met; names the option, its value and the remedy."""


class Entry(NamedTuple):
    """A state in a directory: whose files are complete.

    Attributes:
        model: the directory of its model. nbytes: of all ranks' files. used: seconds since 1970.
    """

    model: Path
    header: StateHeader
    nbytes: int
    used: float

    @property
    def owner(self) -> str:
        """As `key_owner`."""
        return key_owner(self.header.salt)


class Inventory:
    """The states below a directory.

    Args:
        root: as `--lola-state-dir`. key: of the files; None: they are not encrypted.

    Attributes:
        states: those that can be read. unread: those that cannot: the files of their first ranks,
            by the reason of `StateFileError`.

    Raises:
        InventoryError: there is no such directory.
    """

    def __init__(self, root: Path, key: StateKey | None = None) -> None:
        self.root, self.key = root, key
        self.states: list[Entry] = []
        self.unread: dict[str, list[Path]] = defaultdict(list)
        for model in model_directories(root):
            self._read(model)

    def owners(self) -> dict[str, list[Entry]]:
        """States by owner, `none` first."""
        found: dict[str, list[Entry]] = defaultdict(list)
        for state in self.states:
            found[state.owner].append(state)
        return dict(sorted(found.items(), key=lambda item: (item[0] != "none", item[0])))

    def delete(self, states: Iterable[Entry], unread: Iterable[Path] = ()) -> None:
        """Delete states for good, from the memory of running servers too.

        Args:
            unread: files of first ranks; their states go.

        Raises:
            OSError: a file cannot be removed.
        """
        found: dict[tuple[Path, int], list[str]] = defaultdict(list)
        for state in states:
            found[state.model, state.header.ranks].append(state.header.id)
        for first in unread:
            named = parse_name(first.name)
            assert named is not None  # as `_read` found it by its name
            found[first.parent, named[2]].append(named[0])
        for (model, ranks), ids in found.items():
            StateDirectory(model, None, ranks).delete(ids)

    def _read(self, model: Path) -> None:
        names = set(os.listdir(model))
        there = []
        for name in sorted(names):
            parts = parse_name(name)
            if parts is None or parts[1] != 0 or f"{parts[0]}{DELETED}" in names:
                continue
            state, _, ranks = parts
            files = rank_files(model, state, ranks)
            if all(path.name in names for path in files):  # else it is being written
                there.append(files)
        read_ahead([files[0] for files in there])
        for files in there:
            try:
                header = read_header(files[0], self.key)
                fingerprint = Fingerprint(**header.fingerprint)
                if model_directory(self.root, fingerprint) != model:
                    raise StateFileError(files[0], "foreign", "it is of another model")
                stats = [path.stat() for path in files]
            except StateFileError as error:
                self.unread[error.reason].append(files[0])
                continue
            except FileNotFoundError:  # a server removed it a moment ago
                continue
            nbytes = sum(stat.st_size for stat in stats)
            self.states.append(Entry(model, header, nbytes, stats[0].st_mtime))


def model_directories(root: Path) -> list[Path]:
    """The directories of models below a state directory.

    Raises:
        InventoryError: there is no such directory.
    """
    if not root.is_dir():
        raise InventoryError(
            f"--lola-state-dir = {str(root)!r}: no such directory; give the one that the servers "
            "have"
        )
    return [
        path for path in sorted(root.iterdir()) if _MODEL.fullmatch(path.name) and path.is_dir()
    ]
