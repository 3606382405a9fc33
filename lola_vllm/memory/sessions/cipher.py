"""Encryption of state files with a key that the operator gives: AES-256-GCM, piece by piece.

A file has a random salt, and a key of its own that HKDF derives from the secret and the salt. No
other file, and no rewrite of the same one, has the same key, so nonces may be counted: section,
mark of the last piece, number of the piece. A piece is therefore refused in another place, in
another section, in another file, and where a file ends before its last piece. What this cannot see
is an old file of the same state that somebody puts back.

The secret stays in the process that read it. Files tell a check value of it, which says that a file
has another key.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

CIPHER = "AES-256-GCM by 1 MiB"
KEY_VARIABLE = "LOLA_VLLM_STATE_KEY"
HEADER, TOKENS, STATE, KEYS = range(4)  # sections of a file

_PIECE, _TAG = 2**20, 16  # bytes
SALT_BYTES = 32
_SEALED = b"lola-keys\n"  # begins a file that is sealed as a whole, before its salt
_LEAST, _MOST = 32, 4096  # bytes of a secret
_CONTEXT = f"lola-state {CIPHER}".encode()


class StateKeyError(ValueError):
    """A key that cannot be read or used; names where it is, and never the key."""


class StateKey:
    """A secret from which the keys of files are derived.

    Args:
        secret: 32 bytes or more that nobody can guess: it is no password, which would need a slow
            derivation. where: what errors call the place it is from.

    Attributes:
        check: 16 hex digits that files tell; equal for equal secrets.

    Raises:
        StateKeyError: it is too short or too long.
    """

    def __init__(self, secret: bytes, where: str = "the key") -> None:
        if not _LEAST <= len(secret) <= _MOST:
            raise StateKeyError(
                f"{where} has {len(secret)} characters: must be {_LEAST} to {_MOST}, made by "
                "`openssl rand -hex 32`, for example"
            )
        self._secret = secret
        self.check = self._derive(b"", b"lola state key check", 8).hex()

    def __repr__(self) -> str:
        return f"StateKey(check={self.check!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not sent to other processes; each reads it itself")

    def new_file(self) -> FileCipher:
        """For a file that is about to be written."""
        return self.of_file(secrets.token_bytes(SALT_BYTES))

    def of_file(self, salt: bytes) -> FileCipher:
        """For a file that tells this salt.

        Raises:
            ValueError: no file has such a salt.
        """
        if len(salt) != SALT_BYTES:
            raise ValueError(f"the salt has {len(salt)} bytes")
        return FileCipher(salt, self._derive(salt, b"lola state file", 32))

    def _derive(self, salt: bytes, purpose: bytes, length: int) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return HKDF(SHA256(), length, salt, purpose).derive(self._secret)


class FileCipher:
    """Seals and opens the sections of one file. A section is sealed once."""

    def __init__(self, salt: bytes, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self.salt = salt
        self._cipher = AESGCM(key)

    def seal(self, section: int, data: NDArray[Any]) -> Iterator[bytes]:
        """The sealed pieces of a contiguous array; an empty one has one piece too."""
        plain = data.view(np.uint8).reshape(-1).data if data.size else memoryview(b"")
        last = max(1, -(-len(plain) // _PIECE)) - 1
        for index in range(last + 1):
            piece = plain[index * _PIECE : (index + 1) * _PIECE]
            yield self._cipher.encrypt(_nonce(section, index, index == last), piece, _CONTEXT)

    def open(self, section: int, sealed: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The bytes that were sealed.

        Args:
            sealed: `[sealed_size(n)]` uint8.

        Returns:
            `[n]` uint8.

        Raises:
            ValueError: they were changed, moved or cut.
        """
        from cryptography.exceptions import InvalidTag

        step = _PIECE + _TAG
        count = -(-len(sealed) // step)
        if not count or len(sealed) - (count - 1) * step < _TAG + (count > 1):
            raise ValueError(f"{len(sealed)} bytes, which no section has")
        plain = np.empty(len(sealed) - _TAG * count, np.uint8)
        for index in range(count):
            piece = sealed[index * step : (index + 1) * step]
            nonce = _nonce(section, index, index == count - 1)
            try:
                opened = self._cipher.decrypt(nonce, piece.data, _CONTEXT)
            except InvalidTag:
                raise ValueError(f"piece {index} was changed, moved or cut") from None
            start = index * _PIECE
            plain[start : start + len(opened)] = np.frombuffer(opened, np.uint8)
        return plain


def _nonce(section: int, index: int, last: bool) -> bytes:
    return struct.pack(">BBHQ", section, last, 0, index)


def is_sealed(data: bytes) -> bool:
    """Whether these are the bytes of a file that was sealed as a whole."""
    return data.startswith(_SEALED)


def sealed_file(data: bytes, key: StateKey) -> Iterator[bytes]:
    """A file of a document's keys that is sealed as a whole, piece by piece."""
    cipher = key.new_file()
    yield _SEALED + cipher.salt
    yield from cipher.seal(KEYS, np.frombuffer(data, np.uint8))


def open_file(data: bytes, key: StateKey) -> bytes:
    """What `sealed_file` sealed.

    Raises:
        ValueError: it was changed, or sealed with another key, or is no such file.
    """
    start, end = len(_SEALED), len(_SEALED) + SALT_BYTES
    sealed = np.frombuffer(data[end:], np.uint8)
    return key.of_file(data[start:end]).open(KEYS, sealed).tobytes()


def sealed_size(nbytes: int) -> int:
    """Bytes of a sealed section of so many bytes."""
    return nbytes + _TAG * max(1, -(-nbytes // _PIECE))


def read_key(file: Path | None = None, variable: str | None = None) -> StateKey | None:
    """The key in a file or in an environment variable; None where neither is named.

    A line's end after the key is no part of it.

    Raises:
        StateKeyError: it is not there, or it is no key.
    """
    if file is None and variable is None:
        return None
    if variable is None:
        assert file is not None
        where = str(file)
        try:
            with file.open("rb") as opened:
                secret = opened.read(_MOST + 3)
        except OSError as error:
            raise StateKeyError(
                f"{file}: the key cannot be read ({error.strerror}); make one with "
                "`openssl rand -hex 32`, readable by the server's user alone"
            ) from None
    else:
        where = variable
        if variable not in os.environ:
            raise StateKeyError(f"{variable}: there is no such environment variable")
        secret = os.environ[variable].encode(errors="surrogateescape")
    return StateKey(secret.removesuffix(b"\n").removesuffix(b"\r"), where)
