"""Routes to list, show, rename, fork, delete, export and import sessions."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from contextlib import AbstractContextManager, closing, nullcontext
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request
from fastapi.responses import FileResponse
from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from lola_vllm.memory.sessions.names import Reference, SessionNameError, check_name, parse_reference
from lola_vllm.memory.sessions.prefix_hash import digest, salt_hash
from lola_vllm.serving.access import Access
from lola_vllm.serving.bodies import LolaRoute
from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.sessions.owners import owned
from lola_vllm.serving.sessions.protocol import (
    ChangeRequest,
    ComposeRequest,
    Deleted,
    ForkRequest,
    SessionDetail,
    SessionList,
    SessionTokens,
)

PREFIX = "/v1/lola/sessions"
LIST_OPTION = "--lola-list-sessions"
UPLOAD = "LOLA_VLLM_STATE_UPLOAD"
# A file's header and the tensors' names; tokens and pages come on top.
HEADER_BYTES = 2**20

REFUSALS: dict[int | str, dict[str, Any]] = {
    status.value: {"model": ErrorResponse}
    for status in (
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT,
        HTTPStatus.NOT_IMPLEMENTED,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
}
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

router = APIRouter(prefix=PREFIX, tags=["lola"], route_class=LolaRoute, responses=REFUSALS)
json_body = [Depends(validate_json_request)]

Salt = Annotated[
    str | None,
    Header(alias="X-Cache-Salt", description="The `cache_salt` of the session's requests."),
]


@router.get("", response_model=SessionList, responses={403: {"model": ErrorResponse}})
async def sessions(raw_request: Request, salt: Salt = None) -> dict[str, Any]:
    """The caller's sessions, the last used first.

    A server without API keys has one caller, which is everybody. So it answers where its operator
    lets it.
    """
    check_listing(raw_request)
    return {"sessions": await ask(raw_request, "sessions", salt)}


@router.get("/{session}", response_model=SessionDetail)
async def show(session: str, raw_request: Request, salt: Salt = None) -> Any:
    """A session and its states."""
    return await ask(raw_request, "show", salt, session=name_of(session))


@router.get("/{session}/tokens", response_model=SessionTokens)
async def tokens(session: str, raw_request: Request, salt: Salt = None) -> dict[str, Any]:
    """Token ids of all that was said in a session (`agent-7`) or until a turn (`agent-7@3`)."""
    reference = reference_of(session)
    found = await ask(raw_request, "tokens", salt, reference=str(reference))
    said = found["tokens"] + found["tail"]
    return {"session": reference.session, "turn": found["turn"], "tokens": said}


@router.patch("/{session}", response_model=SessionDetail, dependencies=json_body)
async def change(session: str, body: ChangeRequest, raw_request: Request, salt: Salt = None) -> Any:
    """Rename a session."""
    name = Reference(name_of(session))
    return await ask(raw_request, "rename", salt, writes=name, session=session, to=body.session)


@router.delete("/{session}", response_model=Deleted)
async def delete(session: str, raw_request: Request, salt: Salt = None) -> Any:
    """Delete a session (`agent-7`) or a turn of it (`agent-7@3`)."""
    reference = reference_of(session)
    return await ask(raw_request, "delete", salt, writes=reference, reference=str(reference))


@router.post("/{session}/fork", response_model=SessionDetail, dependencies=json_body)
async def fork(session: str, body: ForkRequest, raw_request: Request, salt: Salt = None) -> Any:
    """Another session that goes on from a session or a turn of it."""
    reference = str(reference_of(session))
    return await ask(raw_request, "fork", salt, reference=reference, to=body.to)


@router.post("/{session}/compose", response_model=SessionDetail, dependencies=json_body)
async def compose(
    session: str, body: ComposeRequest, raw_request: Request, salt: Salt = None
) -> Any:
    """A new session made of others, as if their texts stood one behind the other."""
    name = name_of(session)
    check_composing(engine_of(raw_request))
    return await ask(
        raw_request, "compose", salt, writes=Reference(name), sources=body.sources, to=name,
        ttl=body.ttl,
    )  # fmt: skip


@router.get("/{session}/state", response_class=FileResponse, responses={200: {"content": _BINARY}})
async def export_state(
    session: str,
    raw_request: Request,
    salt: Salt = None,
    rank: Annotated[int, Query(ge=0, description="Whose part, with several ranks.")] = 0,
) -> FileResponse:
    """The file of a session's state: to keep, or to import in another server of the model."""
    reference = reference_of(session)
    found = await ask(raw_request, "files", salt, reference=str(reference))
    files = [Path(path) for path in found["files"]]
    if rank >= len(files):
        raise HTTPException(
            HTTPStatus.BAD_REQUEST, f"rank = {rank}: the model has {len(files)} ranks, from 0 on"
        )
    part = "" if len(files) == 1 else f".{rank}of{len(files)}"
    return FileResponse(
        files[rank],
        media_type="application/octet-stream",
        filename=f"{reference.session}{part}.lola.safetensors",
        headers={"X-Lola-Ranks": str(len(files))},
    )


# The body is a file, so `LolaRoute`, which bounds JSON, is not its route.
upload_router = APIRouter()


@upload_router.put(
    "/{session}/state",
    response_model=SessionDetail,
    responses={403: {"model": ErrorResponse}, 413: {"model": ErrorResponse}},
    openapi_extra={"requestBody": {"required": True, "content": _BINARY}},
)
async def import_state(session: str, raw_request: Request, salt: Salt = None) -> Any:
    """Store a state from a file under a new session, where the operator allows it."""
    name = name_of(session)
    if os.environ.get(UPLOAD) != "1":
        raise HTTPException(
            HTTPStatus.FORBIDDEN,
            "states are not taken from outside, because a forged one can put words into a model's "
            f"memory; the operator allows it with {UPLOAD}=1",
        )
    engine = engine_of(raw_request)
    stats = await ask(raw_request, "stats")
    limit = stats["state_bytes"] + 4 * engine.config.model_config.max_model_len + HEADER_BYTES
    with tempfile.NamedTemporaryFile(suffix=".lola.safetensors") as file:
        size = 0
        async for part in raw_request.stream():
            size += len(part)
            if size > limit:
                raise HTTPException(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f"the file has more than {limit} bytes, which no state of this model has",
                )
            file.write(part)
        file.flush()
        return await ask(raw_request, "import_file", salt, file=file.name, session=name)


router.include_router(upload_router)


async def ask(
    raw_request: Request,
    method: str,
    salt: str | None = None,
    writes: Reference | None = None,
    **arguments: Any,
) -> Any:
    """What a method of `SessionManager` returns for the owner of this request.

    Args:
        salt: the caller's. writes: the session that it changes.

    Raises:
        HTTPException: it cannot be answered.
    """
    validate_cache_salt(salt)
    engine = engine_of(raw_request)
    if method != "stats":
        arguments["salt"] = owned(salt)
    with nullcontext() if writes is None else await lock_session(engine, writes, salt):
        return await engine.sessions(method, **arguments)


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
    """Lock a name until the context ends, in all API processes of a server.

    A Unix socket of the name is bound in Linux's abstract namespace. Only one socket can have a
    name, and the system drops it with the process that bound it. So a process that ends in the
    middle of a request leaves nothing behind.

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


def check_composing(engine: LolaEngine) -> None:
    """Refuse what composes sessions, as libraries do, where states are found by their texts alone.

    Raises:
        HTTPException: 501.
    """
    if engine.config.cache_config.enable_prefix_caching:
        # It finds states by their tokens alone, and those of composed texts are others.
        raise HTTPException(
            HTTPStatus.NOT_IMPLEMENTED,
            "sessions are composed, as for an answer from a library, where prefix caching is off; "
            "start the server without --enable-prefix-caching",
        )


def check_listing(raw_request: Request) -> None:
    """Refuse to list what belongs to everybody.

    Raises:
        HTTPException: 403.
    """
    access: Access | None = getattr(raw_request.app.state, "lola_access", None)
    if access is not None and not access.lists:
        raise HTTPException(
            HTTPStatus.FORBIDDEN,
            "this server has no API keys, so everybody would see everybody's sessions; ask for one "
            f"by its name, or start the server with --api-key or {LIST_OPTION}",
        )


def engine_of(raw_request: Request) -> LolaEngine:
    """The engine of the server."""
    engine: LolaEngine = raw_request.app.state.lola_engine
    return engine


def name_of(name: str, field: str = "session") -> str:
    """A session's name from a path, or that of what else is named so."""
    try:
        return check_name(name, field)
    except SessionNameError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from None


def reference_of(session: str) -> Reference:
    """A session or one of its turns from a path."""
    try:
        return parse_reference(session, "session")
    except SessionNameError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from None
