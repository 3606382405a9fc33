"""Where the CUDA sources run: emulated on the CPU, and on a GPU where there is one."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lola_vllm.ops import native

ROOT = Path(__file__).parents[2]


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


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    torch.ops.load_library(str(build_emulation(tmp_path_factory.mktemp("emulation"))))
    return torch.ops.lola_emulated.decode


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where tensors live; `cuda_problem.decode` picks its op by it."""
    if request.param == "emulated":
        request.getfixturevalue("emulation")
        monkeypatch.setenv("LOLA_EMULATED_PROCESSORS", "1")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if not (
        native.load() and torch._C._dispatch_has_kernel_for_dispatch_key("lola::decode", "CUDA")
    ):
        pytest.skip("the extension was built without its CUDA kernels")
    return torch.device("cuda")
