"""The endpoint plugin: the routes under /v1/lola and the metrics lola:*, in vLLM's API server.

The routes are under /v1 because `--api-key` covers it. vLLM loads endpoint plugins only if
`VLLM_PLUGINS` names them; `lola-vllm serve` sets this variable.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from vllm import envs

from lola_vllm.engine.vllm.connectors import has_store
from lola_vllm.memory.sessions.settings import STORE_KEY, StoreSettings
from lola_vllm.serving.access import EVERYWHERE, Access, AccessMiddleware
from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.inspector import ROUTE
from lola_vllm.serving.library.routes import router as library_router
from lola_vllm.serving.metrics import LolaMetrics, RefreshMetrics
from lola_vllm.serving.routes import page, router
from lola_vllm.serving.sessions.generate import router as generate_router
from lola_vllm.serving.sessions.management import router as session_router
from lola_vllm.serving.sessions.owners import OwnerMiddleware, Owners
from lola_vllm.serving.sessions.wrappers import wrap_generate

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.config import VllmConfig
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask

logger = logging.getLogger("vllm.lola")

ROUTERS = (router, session_router, generate_router, library_router)


class LolaEndpoints:
    """vLLM's `EndpointPlugin` for LoLA. It logs nothing if another model is served."""

    name = "lola"
    required_tasks: tuple[SupportedTask, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, the middleware that they need, and the line that names the pages."""
        for routes in (page, *ROUTERS):
            app.include_router(routes)
        app.add_middleware(RefreshMetrics)
        app.add_middleware(OwnerMiddleware)
        app.add_middleware(AccessMiddleware)
        start_up = app.router.lifespan_context

        @asynccontextmanager
        async def with_address(app: FastAPI) -> AsyncIterator[Any]:
            """The pages' addresses, and what of the directory is not read, after vLLM's routes."""
            async with start_up(app) as state:
                engine: LolaEngine = app.state.lola_engine
                if engine.is_lola:
                    logger.info("%s", app.state.lola_pages)
                with suppress(HTTPException):  # the store learns how to wake an idle engine
                    for line in (await engine.sessions("stats"))["unread"]:
                        logger.warning("LoLA sessions: %s", line)
                yield state

        app.router.lifespan_context = with_address

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Keep the engine, for the routes, and make the metrics if it serves a LoLA model."""
        assert engine_client is not None  # None only in the server for the task "render"
        engine = LolaEngine(engine_client, str(engine_client.model_config.served_model_name))
        state.lola_engine = engine
        stores = engine.is_lola and has_store(engine.config)
        keys = args.api_key or [envs.VLLM_API_KEY or ""]
        state.lola_access = Access(keys, _settings(engine.config), args)
        state.lola_owners = Owners(keys) if engine.is_lola else None
        wrap_generate(engine_client, stores)
        state.lola_metrics = LolaMetrics(engine) if engine.is_lola else None
        state.lola_pages = describe_pages(args)


def _settings(config: VllmConfig) -> StoreSettings:
    additional = config.additional_config
    given = additional.get(STORE_KEY) if isinstance(additional, dict) else None
    return StoreSettings.from_mapping(given or {}, STORE_KEY)


def describe_pages(args: Namespace) -> str:
    """Where the chat and the memory inspector are, for the arguments of a server."""
    if args.uds:
        return f"LoLA: the chat is / and the memory inspector {ROUTE} of the socket {args.uds}"
    everywhere = args.host in EVERYWHERE
    host = "127.0.0.1" if everywhere else f"[{args.host}]" if ":" in args.host else args.host
    base = f"{'https' if args.ssl_certfile else 'http'}://{host}:{args.port}{args.root_path or ''}"
    asks = " (asks for the API key)" if args.api_key or envs.VLLM_API_KEY else ""
    return f"LoLA: chat: {base}/, memory inspector: {base}{ROUTE}{asks}"
