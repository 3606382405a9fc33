"""One suite for all back ends: each case runs for each back end that it is about.

To add a case, write a test with the fixture `backend` in the file of its subject. Make a problem,
`make_problem(tokens, config, dtype=backend.dtype)`, and call `backend.check(problem, cuts,
decode_from=...)`: the prompt is cut there, then tokens are decoded, and answers and page must be
those of the float64 reference. A parameter named `dtype` or `parts` takes the values that the back
end knows. `@only`, `@fewer` and `@pytest.mark.prompts` say which back ends a case is about.

To add a back end, give `BACKENDS` in tests/support/backends.py a row: its dtypes with tolerances,
its ops, and its pace if a CPU emulates it. If it needs a build, a device or a library, give
`open_backend` a branch, which skips where that is missing. All cases then run for it.

An ordinary run takes the back ends that share a process. `--backend NAME`, once or several times,
takes these alone; `--every N` takes each N-th case, N prime to the lengths of parameters.
`test_interpreted.py` and `test_instruction_sets.py` run the suite again in processes of their own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.support.backends import (
    BACKENDS,
    IN_PROCESS,
    build_emulation,
    chosen,
    has_case,
    open_backend,
)

HERE = Path(__file__).parent


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = metafunc.config.getoption("--backend") or IN_PROCESS
        gpu = {n: [pytest.mark.gpu] if BACKENDS[n].on_gpu else [] for n in names}
        params = [pytest.param(n, marks=gpu[n]) for n in names]
        metafunc.parametrize("backend", params, indirect=True)


def pytest_make_parametrize_id(val):
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


def pytest_collection_modifyitems(config, items):
    """Leave out what is no case of a back end; with `--backend`, what asks for none, and all
    but each `--every`-th case; in the interpreter, cases that show nothing new. Tests of other
    folders stay."""

    def is_case(item):
        if "backend" not in item.fixturenames:
            return not config.getoption("--backend")
        return has_case(item)

    suite = [item for item in items if item.path.is_relative_to(HERE)]
    left_out = set(suite) - set(chosen([*filter(is_case, suite)], config.getoption("--every")))
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


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
