"""Engines run inside the test process."""

import os
from pathlib import Path

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

MODELS = Path(__file__).parents[2] / "models"  # `make test` builds them


@pytest.fixture(scope="module")
def tiny(request, tmp_path_factory):
    """A tiny model with the `LOLA` of the test's module."""
    from tools.support.tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"), request.module.LOLA)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """SmolLM2 with identity maps and its own weights: with a long window it is the stock model,
    which the demo model, whose weights were trained on, is not."""
    from lola_vllm.models.init import init_checkpoint

    out = tmp_path_factory.mktemp("smollm2") / "untrained"
    init_checkpoint(MODELS / "smollm2-base", out, {"sparse_cache_size": 128, "sink_size": 4})
    return out
