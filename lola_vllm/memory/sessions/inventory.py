"""A state directory by owners, for its operator: what each has, moving it to a key, deleting it.

No server has to run. One that does sees each state that is moved as a deletion and a new state.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lola_vllm.memory.sessions.cipher import StateKey
from lola_vllm.memory.sessions.directory import DELETED, StateDirectory, model_directory
from lola_vllm.memory.sessions.file import (
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
from lola_vllm.memory.sessions.names import PAST
from lola_vllm.memory.sessions.owner import move_salt, salt_owner, shown
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes, digest, namespace

_MODEL = re.compile(r"[0-9a-f]{24}")


class InventoryError(ValueError):
    """A request that cannot be met; names the option, its value and the remedy."""


@dataclass(frozen=True)
class OwnerFilter:
    """Whose states are meant.

    Attributes:
        owners: 32 hex digits, or the first of them; those of API keys. none: whether states without
            a key are meant.
    """

    owners: tuple[str, ...] = ()
    none: bool = False

    def has(self, salt: str) -> bool:
        """Whether states with this stored salt are theirs."""
        owner = salt_owner(salt)
        if not owner.endswith(":"):
            return self.none
        return owner.startswith(self.owners)  # of no owners: False


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
    def files(self) -> list[Path]:
        """One per rank."""
        return rank_files(self.model, self.header.id, self.header.ranks)

    @property
    def session(self) -> tuple[Path, str, str]:
        """The session that it belongs to."""
        return (self.model, self.header.salt, self.header.session)


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
        """States by owner as people are shown it, `none` first."""
        found: dict[str, list[Entry]] = defaultdict(list)
        for state in self.states:
            found[shown(salt_owner(state.header.salt))].append(state)
        return dict(sorted(found.items(), key=lambda item: (item[0] != "none", item[0])))

    def of(self, owners: Sequence[OwnerFilter]) -> list[Entry]:
        """The states of these."""
        return [s for s in self.states if any(one.has(s.header.salt) for one in owners)]

    def move(
        self, source: OwnerFilter, target: str | None, report: Callable[[str], object] = print
    ) -> list[str]:
        """Give states to another owner, session by session; each moves as a whole or stays.

        All files of a session are written anew before an old one is deleted. A move that was
        interrupted goes on when it is asked for again.

        Args:
            target: the owner, 32 hex digits; None: nobody, for servers without keys.
            report: takes a line per session.

        Returns:
            What could not be moved, in words.

        Raises:
            OSError: a file cannot be written or removed.
        """
        sessions: dict[tuple[Path, str, str], list[Entry]] = defaultdict(list)
        for state in self.states:
            sessions[state.session].append(state)
        failed = []
        for (model, salt, name), states in list(sessions.items()):
            if not source.has(salt):
                continue
            to = move_salt(salt, target)
            if to == salt:
                continue
            new = {state.header.id: _moved_id(state.header.id, to) for state in states}
            there = {state.header.id for state in sessions.get((model, to, name), ())}
            # Of an earlier move that was interrupted: new files, or old ones that were not removed.
            if not (there <= set(new.values()) or set(new.values()) <= there):
                failed.append(f"{name}: the other owner has a session of this name; rename one")
                continue
            try:
                for state in states:
                    self._write(state, new, to)
                self._directory(states[0]).delete(list(new))
            except StateFileError as error:
                failed.append(f"{name}: {error}")
                continue
            report(f"{name}: {len(states)} states moved")
        return failed

    def delete(self, states: Iterable[Entry]) -> None:
        """Delete states for good, from the memory of running servers too.

        Raises:
            OSError: a file cannot be removed.
        """
        models: dict[tuple[Path, int], list[Entry]] = defaultdict(list)
        for state in states:
            models[state.model, state.header.ranks].append(state)
        for group in models.values():
            self._directory(group[0]).delete([state.header.id for state in group])

    def delete_unread(self) -> None:
        """Delete what cannot be read for good, with the other ranks' files and the keys.

        Raises:
            OSError: a file cannot be removed.
        """
        for first in itertools.chain(*self.unread.values()):
            named = parse_name(first.name)
            assert named is not None  # as `_read` found it by its name
            state, _, ranks = named
            with suppress(OSError):  # a full disk must not keep what is to be deleted
                first.with_name(f"{state}{DELETED}").touch(0o600)
            for path in (*rank_files(first.parent, state, ranks), keys_file(first.parent, state)):
                path.unlink(missing_ok=True)

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

    def _write(self, state: Entry, new: dict[str, str], salt: str) -> None:
        """Write a state's files under another salt, the first rank's last."""
        for rank, path in reversed(list(enumerate(state.files))):
            to = state.model / file_name(new[state.header.id], rank, state.header.ranks)
            expected = with_rank(state.header, rank)
            found, stat = read_state(path, key=self.key, expected=expected), path.stat()
            fingerprint, n = Fingerprint(**found.header.fingerprint), found.header.num_tokens
            before, hashes = (
                PrefixHashes(
                    namespace(fingerprint.key, found.header.adapter, each, found.header.composed),
                    found.tokens,
                )
                for each in (found.header.salt, salt)
            )
            parent, named = found.header.parent, found.header.shared_prefix
            shared = None
            if named is not None:  # its hash depends on the salt, and only its length is lasting
                lengths = (k for k in range(n + 1) if before.prefix_hash(k).hex() == named)
                shared = next((hashes.prefix_hash(k).hex() for k in lengths), None)
            header = replace(
                found.header,
                id=new[state.header.id],
                salt=salt,
                prefix_hash=hashes.prefix_hash(n).hex(),
                block_hash=hashes.block_hash(n).hex(),
                parent=None if parent is None else new.get(parent, parent),
                origin=_moved_id(found.header.session_id, salt),
                document=_moved_id(found.header.document, salt)
                if found.header.library == PAST
                else found.header.document,
                sources=[_moved_id(source, salt) for source in found.header.sources],
                shared_prefix=shared,
            )
            write_state(to, header, found.tokens, found.data, self.key)
            os.utime(to, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def _directory(self, state: Entry) -> StateDirectory:
        fingerprint = Fingerprint(**state.header.fingerprint)
        return StateDirectory(self.root, fingerprint, state.header.ranks, self.key)


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


def _moved_id(state: str, salt: str) -> str:
    """The id of a state under another salt: the same whenever it is asked for."""
    return digest(b"lola moved", state.encode(), salt.encode()).hex()
