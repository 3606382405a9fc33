"""A stored state: a safetensors file with the tokens, the row of pages, a header and checksums.

    tokens  [n] int32          the tokens that the state has seen
    state   [row_bytes] uint8  the pages of all layers of one rank, as `SequenceLayout` has them

The file's metadata is `{"format": "lola-state", "version": "1", "header": JSON, "header_checksum",
"checksum"}`. `checksum` is the SHA-256 of the header's text, the tokens and the row. A file is
written aside and renamed, and only its owner can read it. Whatever is wrong with a file is an error
with a reason: a state is read completely or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lola_vllm.sessions.chain import Chain, Tokens, namespace, token_array
from lola_vllm.sessions.fingerprint import Fingerprint

FORMAT, VERSION = "lola-state", "1"
SUFFIX = ".lola.safetensors"
_NAME = re.compile(r"([0-9a-f]{32})\.(\d{1,4})of(\d{1,4})" + re.escape(SUFFIX))
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:64]


class StateFileError(Exception):
    """A file that cannot be used; `reason` says why in a few words, `text` in a sentence.

    Attributes:
        reason: "missing", "unreadable", "damaged", "version" (of another release) or "foreign" (of
            another model, dtype, adapter, salt or rank).
    """

    def __init__(self, path: Path, reason: str, text: str) -> None:
        super().__init__(f"{path.name}: {text}")
        self.reason = reason
        self.text = text


@dataclass(frozen=True)
class StateHeader:
    """What a file says of its state.

    Attributes:
        id: 32 hex digits. session, turn: whose turn it is. kind: "prompt" or "answer": the text at
            whose end it was taken.
        num_tokens: n. key, boundary: hex, as in `chain.py`.
        fingerprint: as `Fingerprint.to_dict`. adapter: empty where none was used. salt: hash.
        created, expires: seconds since 1970. parent: id of the state it continues.
        pinned: whether it stays whatever else is stored.
        tail: tokens that were said after the n: the last one of an answer is sampled, and the model
            does not read it unless the text goes on.
        rank, ranks: which part of the state the file has, of how many.
    """

    id: str
    session: str
    turn: int
    kind: str
    num_tokens: int
    key: str
    boundary: str
    fingerprint: dict[str, str] = field(repr=False)
    adapter: str = ""
    salt: str = ""
    created: float = 0.0
    expires: float | None = None
    parent: str | None = None
    pinned: bool = False
    tail: list[int] = field(default_factory=list)
    rank: int = 0
    ranks: int = 1

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> StateHeader:
        """Read what `to_json` wrote.

        Raises:
            ValueError: a field is missing, unknown or of another type.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != {f.name for f in fields(cls)}:
            raise ValueError("the fields are not those of a state")
        header = cls(**values)
        for name, kinds in _TYPES.items():
            if not isinstance(values[name], kinds) or isinstance(values[name], bool):
                raise ValueError(f"{name} = {values[name]!r}")
        return header


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "session", "kind", "key", "boundary", "adapter", "salt"), (str,)),
    **dict.fromkeys(("turn", "num_tokens", "rank", "ranks"), (int,)),
    "created": (int, float), "expires": (int, float, type(None)), "parent": (str, type(None)),
    "fingerprint": (dict,), "tail": (list,),
}  # fmt: skip


class State(NamedTuple):
    """What a file holds: its header, tokens `[n]` int32 and row `[row_bytes]` uint8."""

    header: StateHeader
    tokens: Tokens
    row: NDArray[np.uint8]


def file_name(state: str, rank: int, ranks: int) -> str:
    """The file of a rank's part of a state."""
    return f"{state}.{rank}of{ranks}{SUFFIX}"


def parse_name(name: str) -> tuple[str, int, int] | None:
    """(state, rank, ranks) of a file's name; None for names of other files."""
    match = _NAME.fullmatch(name)
    return (match[1], int(match[2]), int(match[3])) if match else None


def write_state(path: Path, header: StateHeader, tokens: Tokens, row: NDArray[np.uint8]) -> int:
    """Write a file completely or not at all, and return its bytes.

    Raises:
        OSError: it cannot be written, because the disk is full or the directory is gone.
    """
    text = header.to_json()
    tokens = token_array(tokens)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "header": text,
        "header_checksum": hashlib.sha256(text.encode()).hexdigest(),
        "checksum": _checksum(text, tokens, row),
    }
    partial = aside(path)
    try:
        # Made first, so that nobody else can read it at any time.
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        save_file({"tokens": tokens, "state": row}, str(partial), metadata=metadata)
        partial.chmod(0o600)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        partial.replace(path)
    except SafetensorError as error:  # of its own input and output
        raise OSError(str(error)) from None
    finally:
        with suppress(OSError):
            partial.unlink()
    return size


def aside(path: Path) -> Path:
    """Where a process writes what is to become a file; `remove_partials` knows the name."""
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")


def read_header(path: Path) -> StateHeader:
    """The header alone; tokens and row are not looked at.

    Raises:
        StateFileError: the file is missing, unreadable, damaged or of another version.
    """
    with _Opened(path) as file:
        return file.header


def read_tokens(path: Path) -> Tokens:
    """The tokens, compared with the header's key.

    Raises:
        StateFileError: as `read_header`.
    """
    with _Opened(path) as file:
        tokens = file.get("tokens")
        _check_tokens(path, file.header, tokens)
        return tokens


def read_state(path: Path, fingerprint: Fingerprint | None = None) -> State:
    """The whole file, compared with its checksum.

    Args:
        fingerprint: of the model that asks; None: of any.

    Raises:
        StateFileError: as `read_header`, or the file is of another model.
    """
    with _Opened(path) as file:
        header = file.header
        if fingerprint is not None:
            difference = fingerprint.difference(header.fingerprint)
            if difference:
                raise StateFileError(path, "foreign", difference)
        tokens, row = file.get("tokens"), file.get("state")
        if _checksum(file.text, tokens, row) != file.metadata.get("checksum"):
            raise StateFileError(path, "damaged", "the checksum does not fit the content")
        _check_tokens(path, header, tokens)
    return State(header, tokens, row)


def remove_partials(directory: Path) -> int:
    """Remove what processes of this machine left behind when they were killed; how many."""
    removed = 0
    for path in directory.glob(f".*.{_HOST}.*.partial"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not _alive(int(pid)):
            with suppress(OSError):
                path.unlink()
                removed += 1
    return removed


def with_rank(header: StateHeader, rank: int) -> StateHeader:
    """The header of a rank's part."""
    return replace(header, rank=rank)


class _Opened:
    """An open file whose header has been checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.is_symlink():
                raise StateFileError(path, "unreadable", "a link, which is not followed")
            self.file = safe_open(str(path), framework="numpy")
            self.metadata: dict[str, str] = self.file.metadata() or {}
        except FileNotFoundError:
            raise StateFileError(path, "missing", "no such file") from None
        except (OSError, SafetensorError) as error:
            reason = "damaged" if isinstance(error, SafetensorError) else "unreadable"
            raise StateFileError(path, reason, str(error)) from None
        self.text = self.metadata.get("header", "")
        if self.metadata.get("format") != FORMAT:
            raise StateFileError(path, "foreign", "not a LoLA state")
        if self.metadata.get("version") != VERSION:
            raise StateFileError(
                path, "version",
                f"version {self.metadata.get('version')} of the format, this release reads "
                f"{VERSION}",
            )  # fmt: skip
        if hashlib.sha256(self.text.encode()).hexdigest() != self.metadata.get("header_checksum"):
            raise StateFileError(path, "damaged", "the header does not fit its checksum")
        try:
            self.header = StateHeader.from_json(self.text)
        except (ValueError, TypeError) as error:
            raise StateFileError(path, "damaged", f"the header cannot be read: {error}") from None

    def get(self, name: str) -> Any:
        """A tensor, checked for its shape and type."""
        dtype, dims = (
            (np.int32, (self.header.num_tokens,)) if name == "tokens" else (np.uint8, None)
        )
        try:
            found = self.file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise StateFileError(self.path, "damaged", f"{name}: {error}") from None
        if found.dtype != dtype or found.ndim != 1 or (dims and found.shape != dims):
            raise StateFileError(self.path, "damaged", f"{name}: {found.dtype} {found.shape}")
        return found

    def __enter__(self) -> _Opened:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)


def _check_tokens(path: Path, header: StateHeader, tokens: Tokens) -> None:
    fingerprint = Fingerprint(**header.fingerprint)
    chain = Chain(namespace(fingerprint.key, header.adapter, header.salt), tokens)
    n = header.num_tokens
    if (chain.key(n).hex(), chain.boundary(n).hex()) != (header.key, header.boundary):
        raise StateFileError(path, "damaged", "the tokens are not those of the header")


def _checksum(text: str, tokens: Tokens, row: NDArray[np.uint8]) -> str:
    found = hashlib.sha256(text.encode())
    found.update(np.ascontiguousarray(tokens).data)
    found.update(np.ascontiguousarray(row).data)
    return found.hexdigest()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
