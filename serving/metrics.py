"""The Prometheus metrics lola:*, next to vLLM's own at /metrics.

No metric is counted while tokens are made. A scrape reads vLLM's gauges and asks the store for its
numbers, at most every few seconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Gauge

from lola_vllm.engine.vllm.connectors import has_store
from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.session_metrics import SessionMetrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("vllm.lola")

REFRESH_S = 5.0  # the store is not asked more often
PATIENCE_S = 2.0  # a scrape does not wait longer; it then reports the earlier values

LABELS = ("model_name", "engine")

# Name without "lola:" -> help.
GAUGES = {
    "states_total": "States that fit in the pool",
    "states_used": "States held by running sequences",
    "states_per_sequence": "States that a running sequence holds; 2 with prefix caching",
    "state_bytes": "Bytes of a state on one rank, all layers",
}


class LolaMetrics:
    """The metrics of one API server."""

    def __init__(self, engine: LolaEngine, registry: CollectorRegistry = REGISTRY) -> None:
        self.engine = engine
        self._labels = {"model_name": engine.model, "engine": "0"}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(
                f"lola:{name}",
                text,
                LABELS,
                registry=registry,
                multiprocess_mode="mostrecent",  # with several API servers: the one just scraped
            )

        self._gauges = {name: gauge(name, text) for name, text in GAUGES.items()}
        self._sessions = (
            SessionMetrics(self._labels, registry=registry) if has_store(engine.config) else None
        )
        self._due = 0.0
        self._refreshing: asyncio.Task[None] | None = None
        for name, value in (
            ("states_total", engine.num_states),
            ("states_per_sequence", engine.states_per_sequence),
            ("state_bytes", engine.bytes_per_state),
        ):
            self._set(name, value)

    async def refresh(self) -> None:
        """Update the metrics, unless that was done a moment ago. Never raises."""
        if self._refreshing is None or self._refreshing.done():
            if time.monotonic() < self._due:
                return
            self._due = time.monotonic() + REFRESH_S
            self._refreshing = asyncio.ensure_future(self._refresh())
        # Not `wait_for`: it would cancel the answer, which the next scrape can still report.
        await asyncio.wait([self._refreshing], timeout=PATIENCE_S)

    async def _refresh(self) -> None:
        used = self.engine.num_states_used()
        if used is not None:
            self._set("states_used", used)
        if self._sessions is not None:
            try:
                self._sessions.update(await self.engine.sessions("stats"))
            except Exception as error:  # of the engine; a scrape must be answered all the same
                logger.debug("LoLA metrics: nothing of the sessions: %s", error)

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].labels(**self._labels).set(value)


class RefreshMetrics:
    """ASGI middleware that updates the metrics before /metrics reads them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass every request on, one for /metrics after an update."""
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/metrics"):
            metrics: LolaMetrics | None = getattr(scope["app"].state, "lola_metrics", None)
            if metrics is not None:
                await metrics.refresh()
        await self.app(scope, receive, send)
