"""The back ends that one suite checks (`tests/ops/conformance`), each behind the same adapter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lola_vllm.core.ops import DecodeBatch, LayerState, cpp, portable
from lola_vllm.core.ops.contract import DecodeOp, PrefillOp, ShiftOp
from lola_vllm.core.ops.reference import LolaState
from tests.support.pages import assert_state_matches
from tests.support.problem import Problem, run

ROOT = Path(__file__).parents[2]
# How close answers come to the reference's. Sums are made in float32 whatever the model's dtype.
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}
# Where probabilities are rounded to the model's dtype before they weigh the values.
ROUNDED = {**TOLERANCE, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


@dataclass(frozen=True)
class Backend:
    """One back end as the suite calls it.

    Attributes:
        tolerance: of answers, by the dtypes that it knows; the first of these is the most exact.
        parts: into how many parts a decoded row's pairs may be cut (for "cuda-emulated": how many
            processors there are to fill).
        prefills: has a prefill of its own; else prompts go through the portable one.
        pace: "full", or "emulated" or "interpreted" where a GPU's threads take turns on a CPU and
            the suite has fewer cases (`fewer`).
        on_gpu: its tensors lie on a GPU.
    """

    name: str
    tolerance: dict[torch.dtype, dict[str, float]]
    parts: tuple[int, ...] = (1,)
    prefills: bool = True
    pace: str = "full"
    on_gpu: bool = False
    decode: DecodeOp = portable.decode
    prefill: PrefillOp = portable.prefill
    shift: ShiftOp | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The most exact dtype that it knows."""
        return next(iter(self.tolerance))

    @property
    def close(self) -> dict[str, float]:
        """Tolerance of answers in that dtype."""
        return self.tolerance[self.dtype]

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return torch.device("cuda" if self.on_gpu else "cpu")

    def cut_in(self, parts: int) -> Backend:
        """The same back end, decoding in so many parts."""
        if self.name == "cuda-emulated":
            return replace(self, decode=partial(_emulated, processors=parts))
        return (
            self if self.parts == (1,) else replace(self, decode=partial(self.decode, splits=parts))
        )

    def run(self, problem: Problem, *args: Any, **options: Any) -> tuple[Tensor, LayerState]:
        """`problem.run` on its device."""
        return run(self, problem, *args, device=self.device, **options)

    def check(
        self,
        problem: Problem,
        *args: Any,
        truth: tuple[Tensor, LolaState] | None = None,
        **options: Any,
    ) -> tuple[Tensor, LayerState]:
        """As `run`; answers and page must be the reference's, `truth` where it is known already."""
        out, state = self.run(problem, *args, **options)
        answers, expected = truth or problem.reference()
        dtype = problem.q.dtype
        torch.testing.assert_close(out.double(), answers, **self.tolerance[dtype])
        close = TOLERANCE[torch.promote_types(dtype, torch.float32)]
        assert_state_matches(problem, state, expected=expected, **close)
        return out, state


def _known(*dtypes: torch.dtype, rounded: bool = False) -> dict[torch.dtype, dict[str, float]]:
    return {dtype: (ROUNDED if rounded else TOLERANCE)[dtype] for dtype in dtypes}


_CPU = _known(torch.float64, torch.float32, torch.bfloat16)
_GPU = _known(torch.float32, torch.bfloat16, torch.float16, rounded=True)
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("torch", _known(torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        Backend("cpp", _CPU),
        Backend("cpp-threads", _CPU),
        Backend("cuda-emulated", _GPU, (1, 4, 64), prefills=False, pace="emulated"),
        Backend("cuda", _GPU, prefills=False, on_gpu=True),
        Backend("triton", _GPU, (1, 2, 4), on_gpu=True),
        Backend("triton-interpreted", _GPU, (1, 2, 4), pace="interpreted"),
        Backend("xformers-interpreted", _GPU, pace="interpreted"),
    )
}
# The interpreter is chosen by an environment variable before Triton is imported, so these have
# processes of their own.
INTERPRETED = tuple(b.name for b in BACKENDS.values() if b.pace == "interpreted")
IN_PROCESS = tuple(name for name in BACKENDS if name not in INTERPRETED)


def only(*names: str) -> pytest.MarkDecorator:
    """The case is about these back ends alone."""
    return pytest.mark.only(*names)


def fewer(pace: str, **values: list[Any]) -> pytest.MarkDecorator:
    """At a pace, the parameters have only these of their values."""
    return pytest.mark.fewer(pace, **values)


def has_case(item: pytest.Item) -> bool:
    """Whether a test of the suite is one for its back end."""
    params = item.callspec.params  # type: ignore[attr-defined]
    backend = BACKENDS[params["backend"]]
    if any(backend.name not in mark.args for mark in item.iter_markers("only")):
        return False
    if params.get("dtype", backend.dtype) not in backend.tolerance:
        return False
    if params.get("parts", 1) not in backend.parts:
        return False
    if (
        backend.pace == "interpreted"
        and params.get("interval") == 1
        and not any(mark.kwargs.get("interval") == [1] for mark in item.iter_markers("fewer"))
        and item.path.stem not in ("test_lengths", "test_numbers")
    ):  # an update at every token: the same kernels, and many times as long
        return False
    # Of xformers' back end the softmax part of prefill alone is not Triton's.
    if backend.name.startswith("xformers") and (
        item.path.stem
        in (
            "test_arguments",
            "test_int8_pairs",
            "test_long_sequences",
            "test_importance",
        )
        or item.originalname == "test_hundreds_of_rows"  # of which updates are due
        or params.get("fed") == "tokens"
        or params.get("interval") == 1
    ):
        return False
    if not backend.prefills and (
        item.get_closest_marker("prompts") or params.get("fed") == "prompt"
    ):
        return False
    return all(
        params[name] in values
        for mark in item.iter_markers("fewer")
        if mark.args == (backend.pace,)
        for name, values in mark.kwargs.items()
    )


def chosen(cases: list[pytest.Item], every: int) -> list[pytest.Item]:
    """Each so-many-th case. In the interpreter, of each test its share of the cases with a value
    that none before them has, one case at least.

    They are gone through in steps of about 0.6 of their number, so that values mix, and each test's
    share begins at another one of them, so that tests together have all values.
    """
    tests: dict[object, list[pytest.Item]] = {}
    plain = []
    for case in cases:
        params = case.callspec.params if hasattr(case, "callspec") else {}
        if "backend" in params and BACKENDS[params["backend"]].pace == "interpreted":
            name = case.nodeid.partition("[")[0], params["backend"]
            tests.setdefault(name, []).append(case)
        else:  # also what asks for no back end
            plain.append(case)
    kept = plain[::every]
    for number, same in enumerate(tests.values()):
        step = next(
            n for n in range(round(0.618 * len(same)) or 1, 0, -1) if gcd(n, len(same)) == 1
        )
        seen: set[tuple[str, str]] = set()
        new = []
        for i in range(len(same)):
            case = same[i * step % len(same)]
            values = {(name, repr(v)) for name, v in case.callspec.params.items()}  # type: ignore[attr-defined]
            if not values <= seen:
                new.append(case)
            seen |= values
        kept += new[number % min(every, len(new)) :: every]
    return kept


def open_backend(name: str, emulation: Callable[[], Path]) -> Backend:
    """A back end ready to be called; skips the test where this machine cannot have it.

    Args:
        emulation: gives the library of `build_emulation`.
    """
    backend = BACKENDS[name]
    if name == "torch":
        return backend
    if backend.on_gpu and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if name == "cuda-emulated":
        torch.ops.load_library(str(emulation()))
        return replace(backend, decode=_emulated)
    if name.startswith(("cpp", "cuda")):
        assert cpp.load(), "the C++ extension is part of a development set-up"
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        if backend.on_gpu and not has_kernel("lola::decode", "CUDA"):
            pytest.skip("the extension was built without its CUDA kernels")
        prefill = cpp.prefill if backend.prefills else portable.prefill
        return replace(backend, decode=cpp.decode, prefill=prefill)
    from lola_vllm.kernels import backend as kernels

    if name == "triton":
        from lola_vllm.kernels.shift import shift_layers

        ops = {"decode": kernels.decode, "prefill": kernels.prefill, "shift": shift_layers}
        return replace(backend, **ops)
    from tests.support import interpreter

    interpreter.install()
    if name == "xformers-interpreted":  # its decode is Triton's; pages are read by portable's here
        from tests.support import xformers_standin

        xformers_standin.install()
        return replace(backend, prefill=_no_wait(xformers_standin.prefill))
    return replace(backend, decode=_no_wait(kernels.decode), prefill=_no_wait(kernels.prefill))


def run_suite(name: str, every: int = 1, **env: str) -> int:
    """Run the suite for one back end in a process of its own.

    Args:
        every: run each so-many-th case only, where another process runs them all.
        env: environment variables of that process.

    Returns:
        How many cases passed; all that ran did.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--backend", name]
    result = subprocess.run(
        [*command, "--every", str(every), str(ROOT / "tests" / "ops" / "conformance")],
        env=os.environ | env, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = re.search(r"^(\d+) passed", result.stdout, re.MULTILINE)
    assert passed, result.stdout[-5000:]
    return int(passed[1])


def _emulated(
    state: LayerState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: DecodeBatch,
    out: Tensor,
    processors: int = 1,
) -> None:
    """`contract.DecodeOp` on the emulated CUDA sources, for a GPU of so many processors."""
    os.environ["LOLA_EMULATED_PROCESSORS"] = str(processors)
    torch.ops.lola_emulated.decode(*cpp.arguments(state, q, k, v, batch, out))


class NoWait(TorchDispatchMode):
    """Refuses the operators that make a host wait for a GPU or give shapes that hang on data."""

    WAITING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in self.WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def _no_wait(op: Callable[..., None]) -> Callable[..., None]:
    def call(*args: Any, **options: Any) -> None:
        with NoWait():
            op(*args, **options)

    return call


def build_emulation(folder: Path) -> Path:
    """The CUDA sources as a CPU library, which traps where a vector is not aligned."""
    torch_include = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-w", "-DLOLA_EMULATE",
        "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", f"-I{torch_include}",
    ]  # fmt: skip

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run(
            ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True
        )
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted((ROOT / "csrc/cuda").glob("*.cu"))))
    library = folder / "emulated.so"
    libraries = [f"-L{torch_include.parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(
        ["g++", "-shared", "-o", str(library), *map(str, objects), *libraries], check=True
    )
    return library
