"""Shared settings: quiet threads (a busy neighbour slows spinning ones tenfold)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "ops"))  # tests share ops/problem.py
sys.path.append(str(Path(__file__).parent / "engine"))  # and engine/tiny.py


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several workers share the tests, a module stays on one of them, for what its tests
    share; the HTTP tests stay together, as they share two servers."""
    root = Path(__file__).parent
    for item in items:
        module = item.path.relative_to(root).with_suffix("")
        together = module.parent if module.parent.name == "serving" else module
        item.add_marker(pytest.mark.xdist_group(str(together)))


@pytest.fixture
def fresh_choice(monkeypatch):
    """The back end is chosen anew, by nothing in the environment, and again after the test."""
    from lola_vllm.ops import choose_backend

    monkeypatch.delenv("LOLA_VLLM_OPS", raising=False)
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()
