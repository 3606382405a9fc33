"""A stored state: a safetensors file with the tokens, the pages, a header and checksums.

    tokens  [n] int32          the tokens that the state has seen
    state   [rank_bytes] uint8  the pages of all layers of one rank, as `SequenceLayout` has them

The file's metadata is `{"format": "lola-state", "version": "3", "header": JSON, "header_checksum",
"checksum"}`. `checksum` is the SHA-256 of the header's text, the tokens and the pages. A file is
written aside and renamed, and only its owner can read it. Whatever is wrong with a file is an error
with a reason: a state is read completely or not at all.

With a key, the container holds sealed bytes, `tokens` and `state` `[sealed_size] uint8`, and its
metadata is `{"format", "version", "cipher", "key": check value, "salt": hex, "header": base64 of
the sealed JSON}` (`cipher.py`). It has no checksums, which would tell of the text.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lola_vllm.memory.sessions.cipher import (
    CIPHER,
    HEADER,
    STATE,
    TOKENS,
    FileCipher,
    StateKey,
    sealed_size,
)
from lola_vllm.memory.sessions.fingerprint import Fingerprint
from lola_vllm.memory.sessions.header import StateHeader as StateHeader
from lola_vllm.memory.sessions.partial import write_aside
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes, Tokens, namespace, token_array

FORMAT, VERSION = "lola-state", "3"
SUFFIX = ".lola.safetensors"
KEYS_SUFFIX = ".lola.keys"
# Files whose headers are read ahead at once: the requests that a disk is given at a time.
_READERS = 32
_HEAD_BYTES = 8192  # of a file that hold its header, unless it is a very long one
_SECTIONS = {"tokens": TOKENS, "state": STATE}
_NAME = re.compile(r"([0-9a-f]{32})\.(\d{1,4})of(\d{1,4})" + re.escape(SUFFIX))


class StateFileError(Exception):
    """A file that cannot be used; `reason` says why in a few words, `text` in a sentence.

    Attributes:
        reason: "missing", "unreadable", "damaged", "version" (of another release), "foreign" (of
            another model, dtype, adapter, salt or rank), "key" (encrypted with another key, or
            there is no key here) or "plain" (not encrypted, though there is a key here).
    """

    def __init__(self, path: Path, reason: str, text: str) -> None:
        super().__init__(f"{path.name}: {text}")
        self.reason = reason
        self.text = text


class State(NamedTuple):
    """What a file holds: its header, tokens `[n]` int32 and data `[rank_bytes]` uint8,
    the pages of one rank."""

    header: StateHeader
    tokens: Tokens
    data: NDArray[np.uint8]


def file_name(state: str, rank: int, ranks: int) -> str:
    """The file of a rank's part of a state."""
    return f"{state}.{rank}of{ranks}{SUFFIX}"


def rank_files(directory: Path, state: str, ranks: int) -> list[Path]:
    """The files of all ranks' parts of a state, by rank."""
    return [directory / file_name(state, rank, ranks) for rank in range(ranks)]


def keys_file(directory: Path, state: str) -> Path:
    """The file of the keys of a library's document, beside that of its state
    (`memory/documents/shelf.py`). It goes with the state."""
    return directory / f"{state}{KEYS_SUFFIX}"


def parse_name(name: str) -> tuple[str, int, int] | None:
    """(state, rank, ranks) of a file's name; None for names of other files."""
    match = _NAME.fullmatch(name)
    return (match[1], int(match[2]), int(match[3])) if match else None


def write_state(
    path: Path,
    header: StateHeader,
    tokens: Tokens,
    data: NDArray[np.uint8],
    key: StateKey | None = None,
) -> int:
    """Write a file completely or not at all, and return its bytes.

    Args:
        key: to encrypt it with; None: it is not encrypted.

    Raises:
        OSError: it cannot be written, because the disk is full or the directory is gone.
        ValueError: a field of the header has a value that nobody would read.
    """
    text, tokens = header.to_json(), token_array(tokens)
    metadata = {"format": FORMAT, "version": VERSION}
    sections: dict[str, NDArray[Any]] = {"tokens": tokens, "state": np.ascontiguousarray(data)}
    if key is None:
        metadata |= {
            "header": text,
            "header_checksum": hashlib.sha256(text.encode()).hexdigest(),
            "checksum": _checksum(text, tokens, data),
        }
    else:
        cipher = key.new_file()
        sealed = b"".join(cipher.seal(HEADER, np.frombuffer(text.encode(), np.uint8)))
        metadata |= {
            "cipher": CIPHER,
            "key": key.check,
            "salt": cipher.salt.hex(),
            "header": base64.b64encode(sealed).decode(),
        }
        sections = {
            name: np.frombuffer(b"".join(cipher.seal(_SECTIONS[name], section)), np.uint8)
            for name, section in sections.items()
        }
    # The library's own way to a file would leave one beside it where a server is killed.
    return write_aside(path, [save(sections, metadata)])


def read_header(
    path: Path, key: StateKey | None = None, expected: StateHeader | None = None
) -> StateHeader:
    """The header alone; tokens and pages are not looked at.

    Args:
        key: of the files here; a file that has another or none is refused, and where this is None,
            one that is encrypted.
        expected: of the state that is asked for; a file of another state or rank is damaged. So is
            one with a name of `file_name` that is not that of its own state and rank.

    Raises:
        StateFileError: the file is missing, unreadable, damaged, of another version or of another
            key.
    """
    return _Opened(path, key, expected=expected).header


def read_ahead(paths: Sequence[Path]) -> None:
    """Bring the headers of files into the system's page cache, many at a time.

    A header on a cold disk costs a few milliseconds of waiting. What is there is not looked at:
    `read_header` does that afterwards, and also reads what could not be read here.
    """
    with ThreadPoolExecutor(_READERS, "lola-state-read-ahead") as pool:
        pool.map(_touch, paths)


def _touch(path: Path) -> None:
    with suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            # Without it the system would read more of each file than the header.
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(file, _HEAD_BYTES, 0)
        finally:
            os.close(file)


def read_tokens(
    path: Path, key: StateKey | None = None, expected: StateHeader | None = None
) -> Tokens:
    """The tokens, compared with the header's hashes.

    Args:
        key, expected: as in `read_header`.

    Raises:
        StateFileError: as `read_header`.
    """
    file = _Opened(path, key, expected=expected)
    tokens: Tokens = file.get("tokens").view(np.int32)
    _check_tokens(path, file.header, tokens)
    return tokens


def read_state(
    path: Path,
    fingerprint: Fingerprint | None = None,
    key: StateKey | None = None,
    plain: bool = False,
    expected: StateHeader | None = None,
) -> State:
    """The whole file, compared with its checksum.

    Args:
        fingerprint: of the model that asks; None: of any. key, expected: as in `read_header`.
        plain: take a file that is not encrypted although there is a key.

    Raises:
        StateFileError: as `read_header`, or the file is of another model.
    """
    file = _Opened(path, key, plain, expected)
    header = file.header
    difference = fingerprint.difference(header.fingerprint) if fingerprint is not None else None
    if difference:
        raise StateFileError(path, "foreign", difference)
    tokens, data = file.get("tokens").view(np.int32), file.get("state")
    if file.cipher is None and _checksum(file.text, tokens, data) != file.metadata.get("checksum"):
        raise StateFileError(path, "damaged", "the checksum does not fit the content")
    _check_tokens(path, header, tokens)
    return State(header, tokens, data)


def with_rank(header: StateHeader, rank: int) -> StateHeader:
    """The header of a rank's part."""
    return replace(header, rank=rank)


class _Opened:
    """An open file whose header has been checked.

    Everybody who reads a state opens its file here, so here it is compared with the state that is
    meant. Where it is encrypted, header, tokens and pages are sealed with one key of this file
    alone, so a header that is compared answers for the rest.

    Attributes:
        cipher: None for a file that is not encrypted. text: of the header.
    """

    def __init__(
        self,
        path: Path,
        key: StateKey | None,
        plain: bool = False,
        expected: StateHeader | None = None,
    ) -> None:
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
        if self.metadata.get("format") != FORMAT:
            raise StateFileError(path, "foreign", "not a LoLA state")
        if self.metadata.get("version") != VERSION:
            raise StateFileError(
                path, "version",
                f"version {self.metadata.get('version')} of the format, this release reads "
                f"{VERSION}",
            )  # fmt: skip
        self.cipher = self._cipher(key, plain)
        self.text = self._header_text()
        try:
            self.header = StateHeader.from_json(self.text)
        except ValueError as error:
            raise StateFileError(path, "damaged", f"the header cannot be read: {error}") from None
        own = (self.header.id, self.header.rank, self.header.ranks)
        if parse_name(path.name) not in (None, own) or (
            expected is not None and expected.identity != self.header.identity
        ):
            raise StateFileError(path, "damaged", "it holds another state than is looked for in it")
        self._check_shapes()

    def get(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor."""
        try:
            found = self.file.get_tensor(name).view(np.uint8)
            return found if self.cipher is None else self.cipher.open(_SECTIONS[name], found)
        except (SafetensorError, OSError, ValueError) as error:
            raise StateFileError(self.path, "damaged", f"{name}: {error}") from None

    def _cipher(self, key: StateKey | None, plain: bool) -> FileCipher | None:
        """What opens the file; None where nothing has to.

        Raises:
            StateFileError: it has another key than the one that is here, or only one of the two is.
        """
        found = self.metadata.get("cipher")
        if found is None:
            if key is None or plain:
                return None
            raise StateFileError(
                self.path, "plain", "it is not encrypted, and files here are; it is not used"
            )
        if found != CIPHER:
            raise StateFileError(
                self.path, "version", f"its cipher is {found!r}, this release reads {CIPHER!r}"
            )
        if key is None or self.metadata.get("key") != key.check:
            here = "there is no key here" if key is None else "the key here is another one"
            raise StateFileError(self.path, "key", f"it is encrypted, and {here}; it is not used")
        try:
            return key.of_file(bytes.fromhex(self.metadata.get("salt", "")))
        except ValueError as error:
            raise StateFileError(self.path, "damaged", str(error)) from None

    def _header_text(self) -> str:
        text = self.metadata.get("header", "")
        if self.cipher is None:
            checksum = hashlib.sha256(text.encode()).hexdigest()
            if checksum != self.metadata.get("header_checksum"):
                raise StateFileError(self.path, "damaged", "the header does not fit its checksum")
            return text
        try:
            data = base64.b64decode(text, validate=True)
            if base64.b64encode(data).decode() != text:  # the last digit may have spare bits
                raise ValueError("not as it was written")
            return self.cipher.open(HEADER, np.frombuffer(data, np.uint8)).tobytes().decode()
        except ValueError as error:
            raise StateFileError(self.path, "damaged", f"header: {error}") from None

    def _check_shapes(self) -> None:
        """Compare what the container says of its tensors with the header."""
        count = self.header.num_tokens
        if self.cipher is not None:
            count = sealed_size(4 * count)
        for name, kind in (("tokens", "I32" if self.cipher is None else "U8"), ("state", "U8")):
            try:
                tensor = self.file.get_slice(name)
            except SafetensorError as error:
                raise StateFileError(self.path, "damaged", f"{name}: {error}") from None
            found, shape = tensor.get_dtype(), tensor.get_shape()
            if found != kind or len(shape) != 1 or (name == "tokens" and shape != [count]):
                raise StateFileError(self.path, "damaged", f"{name}: {found} {shape}")


def _check_tokens(path: Path, header: StateHeader, tokens: Tokens) -> None:
    fingerprint = Fingerprint(**header.fingerprint)
    start = namespace(fingerprint.key, header.adapter, header.salt, header.composed)
    hashes = PrefixHashes(start, tokens)
    n = header.num_tokens
    if (hashes.prefix_hash(n).hex(), hashes.block_hash(n).hex()) != (
        header.prefix_hash,
        header.block_hash,
    ):
        raise StateFileError(path, "damaged", "the tokens are not those of the header")


def _checksum(text: str, tokens: Tokens, data: NDArray[np.uint8]) -> str:
    found = hashlib.sha256(text.encode())
    found.update(np.ascontiguousarray(tokens).data)
    found.update(np.ascontiguousarray(data).data)
    return found.hexdigest()
