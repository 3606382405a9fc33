"""The routes under /v1/lola."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import torch
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

from lola_vllm.serving import chat, inspector
from lola_vllm.serving.bodies import LolaRoute
from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.history import stop_interval
from lola_vllm.serving.prompt import prompt_tokens, token_texts
from lola_vllm.serving.protocol import InfoResponse, MemoryRequest, MemoryResponse
from lola_vllm.serving.static import HEADERS, File

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status.value: {"model": ErrorResponse}
    for status in (
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.NOT_IMPLEMENTED,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
}

router = APIRouter(prefix="/v1/lola", tags=["lola"], route_class=LolaRoute)


@router.get("/info", response_model=InfoResponse, responses=_REFUSALS)
async def info(raw_request: Request) -> InfoResponse:
    """The model's LoLA parameters, what its states cost, and the states there are."""
    return await _engine(raw_request).info()


@router.post(
    "/memory",
    response_model=MemoryResponse,
    responses=_REFUSALS,
    dependencies=[Depends(validate_json_request)],
)
@with_cancellation
async def memory(body: MemoryRequest, raw_request: Request) -> JSONResponse:
    """Which tokens of a prompt each head's sparse cache holds, and their recall errors.

    The prompt runs as an ordinary request for one token.
    """
    return JSONResponse((await _memory(body, raw_request)).model_dump())


# The pages' files, without an API key: they hold neither a key nor data.
page = APIRouter(tags=["lola"])


@page.get("/", response_class=HTMLResponse)
async def chat_page(raw_request: Request) -> Response:
    """A chat in the browser, with the memory of its session; of a LoLA model only."""
    if not _engine(raw_request).is_lola:
        raise HTTPException(HTTPStatus.NOT_FOUND, HTTPStatus.NOT_FOUND.phrase)
    return _file(chat.page_files(), "", "the chat")


@page.get(f"{chat.ROUTE}/{{name}}", include_in_schema=False)
async def chat_file(name: str) -> Response:
    """A file of the chat page."""
    return _file(chat.page_files(), name, "the chat")


@page.get(inspector.ROUTE, response_class=HTMLResponse)
@page.get(f"{inspector.ROUTE}/{{name}}", include_in_schema=False)
async def inspector_page(name: str = "") -> Response:
    """The memory inspector: a page that shows what /v1/lola/memory answers."""
    return _file(inspector.page_files(), name, "the inspector")


def _file(files: Mapping[str, File], name: str, owner: str) -> Response:
    file = files.get(name)
    if file is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, f"{name!r:.80}: no file of {owner}")
    return Response(file.body, media_type=file.kind, headers=HEADERS)


async def _memory(body: MemoryRequest, raw_request: Request) -> MemoryResponse:
    engine = _engine(raw_request)
    engine.check()
    for layer in body.layers or ():
        if layer not in range(engine.num_layers):
            raise HTTPException(
                HTTPStatus.BAD_REQUEST, f"layers: {layer} is none of 0 to {engine.num_layers - 1}"
            )
    validate_cache_salt(body.cache_salt)
    tokens = await prompt_tokens(body, raw_request, engine)
    layers = await engine.memory(
        tokens, body.layers, body.cache_salt, forgotten=body.forgotten, history=body.history
    )
    tokenizer = engine.client.renderer.tokenizer
    texts = None
    if tokenizer is not None:  # in a thread, because a long prompt takes a while
        texts = await asyncio.to_thread(token_texts, tokenizer, tokens)
    layout = engine.page
    shifted_by = 0 if engine.schedule is None else engine.schedule.shifted_by(len(tokens))
    rope_positions = None
    if engine.schedule is not None and shifted_by:
        positions = torch.arange(len(tokens))
        rope_positions = engine.schedule.exact_rope_positions(
            positions, len(tokens), layout.sink_size
        ).tolist()
    return MemoryResponse(
        model=body.model or engine.model,
        num_tokens=len(tokens),
        tokens=tokens,
        texts=texts,
        sinks=min(len(tokens), layout.sink_size),
        window_start=int(layout.window_start(torch.tensor(len(tokens)))),
        window_size=layout.window_size,
        update_interval=layout.update_interval,
        history_interval=stop_interval(layout.update_interval, len(tokens))
        if body.history
        else None,
        shifted_by=shifted_by,
        rope_positions=rope_positions,
        error="sre" if layout.num_state_heads == layout.num_sparse_heads else "relative",
        layers=layers,
    )


def _engine(raw_request: Request) -> LolaEngine:
    engine: LolaEngine = raw_request.app.state.lola_engine
    return engine
