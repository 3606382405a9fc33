"""The endpoint plugin: the routes under /v1/lola and the metrics lola:*, in vLLM's API server.

Under /v1 because that is what `--api-key` covers. vLLM loads endpoint plugins only where
`VLLM_PLUGINS` names them; `lola-vllm serve` sees to that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.metrics import LolaMetrics, RefreshMetrics
from lola_vllm.serving.routes import router

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask


class LolaEndpoints:
    """vLLM's `EndpointPlugin` for LoLA. Stays quiet where another model is served."""

    name = "lola"
    required_tasks: tuple[SupportedTask, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and the refreshing of metrics before they are read."""
        app.include_router(router)
        app.add_middleware(RefreshMetrics)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Keep the engine, for the routes, and make the metrics if it serves a LoLA model."""
        assert engine_client is not None  # only the server for the task "render" has none
        engine = LolaEngine(engine_client, str(engine_client.model_config.served_model_name))
        state.lola_engine = engine
        state.lola_metrics = LolaMetrics(engine) if engine.is_lola else None
