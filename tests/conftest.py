"""Shared settings: quiet threads (a busy neighbour slows spinning ones tenfold), and caches."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# A hundred processes import torch and vLLM, which takes twice as long where Python has to compile
# them. Who wants no bytecode beside sources has it elsewhere.
if sys.dont_write_bytecode:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / "build" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
# vLLM remembers a model's flags by the hash of one file: a stale memory must not decide a test, and
# what one process of this run looked up, which starts another, the next one knows.
if "VLLM_CACHE_ROOT" not in os.environ:
    os.environ["VLLM_CACHE_ROOT"] = tempfile.mkdtemp(prefix="lola-vllm-test-")
    atexit.register(shutil.rmtree, os.environ["VLLM_CACHE_ROOT"], ignore_errors=True)
from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several workers share the tests, a module stays on one of them, for what its tests
    share; the HTTP tests stay together, as they share two servers."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.split("::", 1)[0]
            return "tests/serving" if module.startswith("tests/serving/") else module

    return ByModule(config, log)


@pytest.fixture
def fresh_choice(monkeypatch):
    """The back end is chosen anew, by nothing in the environment, and again after the test."""
    from lola_vllm.core.ops import choose_backend, select

    monkeypatch.delenv("LOLA_VLLM_OPS", raising=False)
    monkeypatch.setattr(select, "_failed", set())
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        help="the back end of tests/ops/conformance; may be given several times",
    )
    parser.addoption("--every", type=int, default=1, help="run each N-th case of that suite")
