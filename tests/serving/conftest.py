"""Servers for all HTTP tests: plain `vllm serve` and LoLA's own front with the demo model, and two
of tiny models, with several API keys and with none."""

import json

import httpx
import pytest

from lola_vllm.core import cpu
from lola_vllm.serving.sessions.management import UPLOAD
from tests.support.servers import KEY, MODEL, NOT_COMPILED, keyless_serving
from tools.support.server_process import BIN, serving
from tools.support.speaking import LOLA, make_speaking, serve_speaking

# Switches of other routes, so that these are tested on the same servers. The parser of reasoning
# knows its parts by words, for which no tokenizer needs tokens of its own.
REASONING = ["--reasoning-parser", "granite"]
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
OPTIONS = ["--enforce-eager", "--max-model-len", "2048", "--served-model-name", "smollm2"]
# In the dtype of this machine: plain `vllm serve` would take bfloat16 where it is slow too.
OPTIONS += ["--dtype", cpu.preferred_dtype({}) or "auto"]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    # Few sequences, so that its pool leaves memory to the other servers of these tests.
    command = [str(BIN / "vllm"), "serve", str(MODEL), *OPTIONS, *REASONING, "--max-num-seqs", "32"]
    with serving(log, command, **NOT_COMPILED) as running:
        yield running


@pytest.fixture(scope="session")
def lola_server(tmp_path_factory):
    """Routes under /v1/lola, an API key, and prefix caching in steps of 256 tokens.

    With tools, stored responses, and events of the prefix cache at `events`.
    """
    log = tmp_path_factory.mktemp("lola-server") / "log.txt"
    command = [str(BIN / "lola-vllm"), "serve", str(MODEL), *OPTIONS, "--block-size", "256"]
    events = f"ipc://{log.parent}/events"
    command += ["--kv-events-config", json.dumps(
        {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": events}
    )]  # fmt: skip
    environment = NOT_COMPILED | {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with serving(log, [*command, *TOOLS, "--api-key", KEY], **environment) as running:
        running.events = events
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        yield running


@pytest.fixture(scope="session")
def shifting(tmp_path_factory):
    """A tiny model that was trained on 256 positions, which shift by 64 beyond them."""
    return make_speaking(
        tmp_path_factory.mktemp("keyless") / "tiny",
        max_position_embeddings=256, lola_config=LOLA | {"context_shift": 64},
    )  # fmt: skip


@pytest.fixture(scope="session")
def keyless(shifting, tmp_path_factory):
    """A server of that model as anybody starts one: without keys, eager where there is no GPU."""
    with keyless_serving(shifting, tmp_path_factory.mktemp("keyless-server") / "log.txt") as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A server of a tiny model with a state directory and two API keys; `other` has the second."""
    directory = tmp_path_factory.mktemp("sessions")
    model = make_speaking(directory / "tiny")
    command = [*serve_speaking(model, "tiny"), "--lola-state-dir", str(directory / "states")]
    keys = (KEY, f"not-{KEY}")
    command += ["--api-key", *keys]
    with serving(directory / "log.txt", command, **{UPLOAD: "1"}, **NOT_COMPILED) as running:
        running.client.headers["Authorization"] = f"Bearer {keys[0]}"
        running.other = httpx.Client(
            base_url=running.url, timeout=120, headers={"Authorization": f"Bearer {keys[1]}"}
        )
        yield running
