"""Files that are complete or not there: written aside, then renamed; and what killed writers left.

Servers of several machines and containers may share a directory, so a file that is being written
says little by its name: process 1 of one container is not process 1 of another. A writer therefore
holds a lock on its file, which ends with it however it ends. Some file systems have no locks. There
a file that nobody has changed for an hour has no writer, as a state is written in seconds.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PARTIAL_AGE_S = 3600.0
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:64]
_PARTIAL = re.compile(r"\..*\.([A-Za-z0-9-]+)\.(\d+)(?:-[0-9a-f]+)?\.partial")


def write_aside(path: Path, parts: Iterable[bytes | memoryview]) -> int:
    """Write a file that only its owner can read, completely or not at all, and return its bytes.

    Raises:
        OSError: it cannot be written, because the disk is full or the directory is gone.
    """
    partial = aside(path)
    try:
        with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            with suppress(OSError):  # of file systems without locks
                fcntl.flock(file, fcntl.LOCK_EX)  # waits while `remove_partials` looks
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()
    return size


def aside(path: Path) -> Path:
    """A new name beside a file, of what is to take its place; `is_partial` knows it."""
    owner = f"{_HOST}.{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{owner}.partial")


def is_partial(name: str) -> bool:
    """Whether a file is one that was being written."""
    return bool(_PARTIAL.fullmatch(name))


def remove_partials(directory: Path, age: float = PARTIAL_AGE_S) -> int:
    """Remove what killed writers left in a directory, on this machine or another.

    Args:
        age: seconds without a change after which a file is taken for left. What a process of this
            machine left is removed at once.

    Returns:
        How many were removed. The file of a writer that lives is not.
    """
    removed = 0
    for path in directory.glob(".*"):
        if is_partial(path.name):
            with suppress(OSError):
                if _left(path, age):
                    path.unlink()
                    removed += 1
    return removed


def _left(path: Path, age: float) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        pass
    finally:
        stat = os.fstat(descriptor)
        os.close(descriptor)
    if time.time() - stat.st_mtime >= age:
        return True
    # An empty file may be one that its writer is about to lock.
    return stat.st_size > 0 and _of_dead(path.name)


def _of_dead(name: str) -> bool:
    match = _PARTIAL.fullmatch(name)
    if match is None or match[1] != _HOST:
        return False
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False
