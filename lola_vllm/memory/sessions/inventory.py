"""A state directory, for its operator: what each owner has, its deletion, and the encryption of
files that were written without the directory's key. No server has to run."""

from __future__ import annotations

import fcntl
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lola_vllm.memory.sessions.cipher import KEY_VARIABLE, StateKey, is_sealed, sealed_file
from lola_vllm.memory.sessions.directory import DELETED, StateDirectory, model_directory
from lola_vllm.memory.sessions.file import (
    KEYS_SUFFIX,
    StateFileError,
    StateHeader,
    parse_name,
    rank_files,
    read_ahead,
    read_header,
    read_state,
    write_state,
)
from lola_vllm.memory.sessions.fingerprint import Fingerprint
from lola_vllm.memory.sessions.owner import key_owner
from lola_vllm.memory.sessions.partial import remove_partials, write_aside

KEY_FAULTS = ("plain", "key")  # reasons of `StateFileError` that the right key mends
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


def unread_words(unread: Mapping[str, int], key: bool, root: Path) -> list[str]:
    """What is not read in a directory, why, and the remedy: a sentence for each reason.

    Args:
        unread: states by the reason of `StateFileError`. key: whether a key was given. root: the
            directory, as of `--lola-state-dir`.
    """
    option = f"--lola-state-key-file or {KEY_VARIABLE}"
    why = {
        "plain": "not encrypted, and a key is given; 'lola-vllm states encrypt --lola-state-dir "
        f"{root} --lola-state-key-file FILE' encrypts them",
        "key": f"encrypted with another key than the one of {option}; give the one that they were "
        "written with"
        if key
        else f"encrypted, and no key is given; give it with {option}",
    }
    found = []
    for reason, number in sorted(unread.items()):
        states = "1 state is" if number == 1 else f"{number:,} states are"
        found.append(f"{states} not read in {root}: {why.get(reason, reason)}")
    return found


def encrypt(root: Path, key: StateKey) -> tuple[int, int, list[str]]:
    """Encrypt the files of a directory that are not, each at once: it is the old one or the new.

    Servers with the key may run, and take up what is encrypted. What was interrupted goes on when
    it is asked for again.

    Returns:
        How many files are encrypted now, how many were before, and which cannot be, in words.

    Raises:
        InventoryError: there is no such directory, or a server without a key runs on it.
        OSError: a file cannot be written.
    """
    done, failed = Counter[bool](), list[str]()
    for model in model_directories(root):
        try:
            with _lock(model, fcntl.LOCK_EX) as handle:
                remove_partials(model)  # they are not encrypted either
                for name in _files(model):
                    try:
                        done[_encrypt_file(model / name, key)] += 1
                    except FileNotFoundError:  # it was deleted a moment ago
                        continue
                    except StateFileError as error:
                        failed.append(f"{model.name}/{error}")
                os.fsync(handle)
        except BlockingIOError:
            raise InventoryError(
                f"{model}: a server without a key runs on it, and would write more that is not "
                "encrypted; stop it, and start it again with the key"
            ) from None
    return done[True], done[False], failed


@contextmanager
def plain_writer(model: Path) -> Iterator[None]:
    """A server without a key has a model's directory: `encrypt` is refused meanwhile.

    Raises:
        PermissionError: it is being encrypted.
    """
    try:
        with _lock(model, fcntl.LOCK_SH):
            yield
    except BlockingIOError:
        raise PermissionError(
            f"{model}: it is being encrypted; start the server with the key"
        ) from None


def _files(model: Path) -> list[str]:
    """The files of states and of documents' keys that no server is about to remove."""
    names = sorted(os.listdir(model))
    deleted = {name.removesuffix(DELETED) for name in names if name.endswith(DELETED)}
    ours = [name for name in names if parse_name(name) or name.endswith(KEYS_SUFFIX)]
    return [name for name in ours if name.partition(".")[0] not in deleted]


def _encrypt_file(path: Path, key: StateKey) -> bool:
    stat = path.stat()
    if path.name.endswith(KEYS_SUFFIX):
        data = path.read_bytes()
        if is_sealed(data):
            return False
        write_aside(path, sealed_file(data, key))
    else:
        try:
            read_header(path, key)
            return False
        except StateFileError as error:
            if error.reason != "plain":
                raise
        write_state(path, *read_state(path, key=key, plain=True), key)
    # The time of its last use, but for a nanosecond: a server that runs looks again at a file that
    # it could not read when its time is another one.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    return True


@contextmanager
def _lock(directory: Path, kind: int) -> Iterator[int]:
    """A directory's lock, which ends with the process however it ends; its descriptor.

    Raises:
        BlockingIOError: somebody has it.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # of file systems without locks
            pass
        yield handle
    finally:
        os.close(handle)
