"""One request at a time writes a session or adds a document, in all API processes of a server.

A session is locked by binding a Unix socket of its name in Linux's abstract namespace. Only one
socket can have a name, and the system drops it with the process that bound it. So a process that
ends in the middle of a request leaves nothing behind.
"""

from __future__ import annotations

import errno
import socket
from contextlib import AbstractContextManager, closing
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import HTTPException
from vllm.entrypoints.generate.base.protocol import validate_cache_salt

from lola_vllm.memory.sessions.prefix_hash import digest, salt_hash
from lola_vllm.serving.sessions.owners import owned

if TYPE_CHECKING:
    from lola_vllm.memory.sessions.names import Reference
    from lola_vllm.serving.engine import LolaEngine


async def lock_session(
    engine: LolaEngine, reference: Reference, salt: str | None
) -> AbstractContextManager[object]:
    """Lock a session, as `lock` does."""
    return await lock(
        engine,
        reference.session,
        salt,
        f"{reference.session!r} is being written by another request; wait for its answer, or fork "
        "the session before",
    )


async def lock(
    engine: LolaEngine, name: str, salt: str | None, refusal: str
) -> AbstractContextManager[object]:
    """Lock a name until the context ends.

    Args:
        salt: the caller's.

    Raises:
        HTTPException: another request has the lock, or there is no store.
    """
    validate_cache_salt(salt)
    store = await engine.store_id()
    key = digest(salt_hash(owned(salt)).encode(), name.encode())
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        bound.bind(f"\0lola-vllm/{store}/{key.hex()}")
    except OSError as error:
        bound.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise HTTPException(HTTPStatus.CONFLICT, refusal) from None
    return closing(bound)
