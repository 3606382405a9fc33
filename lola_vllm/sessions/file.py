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
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lola_vllm.sessions.chain import Chain, Tokens, namespace, token_array
from lola_vllm.sessions.fingerprint import Fingerprint
from lola_vllm.sessions.header import StateHeader as StateHeader
from lola_vllm.sessions.partial import write_aside

FORMAT, VERSION = "lola-state", "1"
SUFFIX = ".lola.safetensors"
_NAME = re.compile(r"([0-9a-f]{32})\.(\d{1,4})of(\d{1,4})" + re.escape(SUFFIX))


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
        ValueError: a field of the header has a value that nobody would read.
    """
    text = header.to_json()
    tokens, row = token_array(tokens), np.ascontiguousarray(row)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "header": text,
        "header_checksum": hashlib.sha256(text.encode()).hexdigest(),
        "checksum": _checksum(text, tokens, row),
    }
    return write_aside(path, _container(metadata, {"tokens": tokens, "state": row}))


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
        except ValueError as error:
            raise StateFileError(path, "damaged", f"the header cannot be read: {error}") from None
        self._check_shapes()

    def _check_shapes(self) -> None:
        """Compare what the container says of its tensors with the header."""
        for name, dtype in (("tokens", "I32"), ("state", "U8")):
            try:
                tensor = self.file.get_slice(name)
            except SafetensorError as error:
                raise StateFileError(self.path, "damaged", f"{name}: {error}") from None
            found, shape = tensor.get_dtype(), tensor.get_shape()
            wrong = name == "tokens" and shape != [self.header.num_tokens]
            if found != dtype or len(shape) != 1 or wrong:
                raise StateFileError(self.path, "damaged", f"{name}: {found} {shape}")

    def get(self, name: str) -> Any:
        """A tensor."""
        try:
            return self.file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise StateFileError(self.path, "damaged", f"{name}: {error}") from None

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


def _container(
    metadata: dict[str, str], tensors: Mapping[str, NDArray[Any]]
) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece. The library would write a file of its own making beside
    it, which a killed server leaves, or make a copy of everything in memory."""
    head: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype = {np.dtype(np.int32): "I32", np.dtype(np.uint8): "U8"}[tensor.dtype]
        head[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        yield tensor.data.cast("B") if tensor.size else b""


def _checksum(text: str, tokens: Tokens, row: NDArray[np.uint8]) -> str:
    found = hashlib.sha256(text.encode())
    found.update(np.ascontiguousarray(tokens).data)
    found.update(np.ascontiguousarray(row).data)
    return found.hexdigest()
