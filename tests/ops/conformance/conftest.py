"""One suite for all back ends: each case runs for each back end that it is about.

An ordinary run takes the back ends that share a process; `--backend NAME` takes one.
`test_interpreted.py` and `test_instruction_sets.py` run the suite again in processes of their own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.support.backends import BACKENDS, IN_PROCESS, build_emulation, has_case, open_backend

HERE = Path(__file__).parent


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        name = metafunc.config.getoption("--backend")
        names = [name] if name else IN_PROCESS
        gpu = {n: [pytest.mark.gpu] if BACKENDS[n].on_gpu else [] for n in names}
        params = [pytest.param(n, marks=gpu[n]) for n in names]
        metafunc.parametrize("backend", params, indirect=True)


def pytest_make_parametrize_id(val):
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


def pytest_collection_modifyitems(config, items):
    """Leave out what is no case of a back end; with `--backend`, what asks for none, and all
    but each `--every`-th case."""

    def stays(item):
        if not item.path.is_relative_to(HERE):
            return True
        if "backend" not in item.fixturenames:
            return not config.getoption("--backend")
        return has_case(item)

    kept = [item for item in items if stays(item)][:: config.getoption("--every")]
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


@pytest.fixture(scope="session")
def emulation(tmp_path_factory, worker_id):
    """Builds the emulated CUDA library where a test asks for it, once for all workers."""

    def build():
        if shutil.which("g++") is None:
            pytest.skip("g++ is not installed")
        base = tmp_path_factory.getbasetemp()
        folder = (base if worker_id == "master" else base.parent) / "emulation"
        with FileLock(f"{folder}.lock"):
            if not (folder / "emulated.so").exists():
                folder.mkdir(exist_ok=True)
                build_emulation(folder)
        return folder / "emulated.so"

    return build


@pytest.fixture
def backend(request, emulation):
    """The `Backend` of a case. With more threads than heads, C++ prefill shares out its work in
    another way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(16 if request.param == "cpp-threads" else 1)
    yield open_backend(request.param, emulation)
    torch.set_num_threads(threads)
