"""Two servers of the demo model for all HTTP tests: plain `vllm serve`, and LoLA's own front."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import BIN, KEY, MODEL, Server, serving

from lola_vllm import cpu

OPTIONS = ["--enforce-eager", "--max-model-len", "2048", "--served-model-name", "smollm2"]
# In the dtype of this machine: plain `vllm serve` would take bfloat16 where it is slow too.
OPTIONS += ["--dtype", cpu.preferred_dtype({}) or "auto"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serving(log, [str(BIN / "vllm"), "serve", str(MODEL), *OPTIONS]) as running:
        yield running


@pytest.fixture(scope="session")
def lola_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Routes under /v1/lola, an API key, and prefix caching in steps of 256 tokens."""
    log = tmp_path_factory.mktemp("lola-server") / "log.txt"
    command = [str(BIN / "lola-vllm"), "serve", str(MODEL), *OPTIONS, "--block-size", "256"]
    with serving(log, [*command, "--api-key", KEY]) as running:
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        yield running
