"""Build of lola-vllm: the packages, and the extension `lola_vllm/_C` from csrc/.

CPU kernels are always part of it; CUDA kernels are where torch is a CUDA build and its toolkit's
nvcc is found, for the architectures of TORCH_CUDA_ARCH_LIST.

The extension is optional. Without a C++ compiler, or without torch at build time, the install goes
on without it and says so (the portable torch back end then does the work); set
LOLA_VLLM_REQUIRE_EXT=1 to make that an error.

LOLA_VLLM_SANITIZE=1 builds the C++ kernels with AddressSanitizer and UBSan, for `make sanitize`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
# Top-level folders that install as subpackages of lola_vllm.
FOLDERS = {"lola_vllm.kernels": "kernels", "lola_vllm.serving": "serving"}
# The inspector's page and the deployment files of lola_vllm.serving.
DATA = [f"**/*.{suffix}" for suffix in ("html", "css", "js", "json", "yaml", "yml")]
ABI_TAG = "cp310"
# Compiled for by default; newer GPUs compile the last one's PTX when they first load it.
CUDA_ARCHS = "8.0;9.0;10.0+PTX"
# LOLA_SANITIZE: workspaces are filled with NaN and fenced (csrc/cpu/workspace.h).
SANITIZE = [
    "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined", "-DLOLA_SANITIZE",
]  # fmt: skip
# The oldest torch whose stable ABI the extension uses (2.10: parallel_for).
TORCH_TARGET = "0x020a000000000000"


def packages() -> tuple[list[str], dict[str, str]]:
    """Names of all packages, and where the ones outside lola_vllm/ live."""
    names = find_namespace_packages(str(ROOT), include=["lola_vllm", "lola_vllm.*"])
    folders = {}
    for package, folder in FOLDERS.items():
        if (ROOT / folder).is_dir():
            folders[package] = folder
            below = find_namespace_packages(str(ROOT / folder))
            names += [package, *(f"{package}.{name}" for name in below)]
    return [name for name in names if "__pycache__" not in name], folders


def without_extension(reason: str, remedy: str) -> dict[str, Any]:
    """Go on without the extension, or stop where it is required."""
    message = f"lola-vllm: {reason}; the C++ kernels are not built. To get them: {remedy}."
    if os.environ.get("LOLA_VLLM_REQUIRE_EXT") == "1":
        sys.exit(f"{message} (LOLA_VLLM_REQUIRE_EXT=1)")
    print(f"WARNING: {message}", file=sys.stderr)
    return {}


def cuda_toolkit() -> bool:
    """Whether CUDA kernels can be built; says why not where torch could use them."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return False
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not nvcc.is_file():
        reason = "nvcc is not found (set CUDA_HOME)"
    else:
        report = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", report)
        if release and release.group(1) == torch.version.cuda.split(".")[0]:
            major, minor = map(int, release.groups())
            known = CUDA_ARCHS if (major, minor) >= (12, 8) else "8.0;9.0+PTX"
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", known)
            return True
        reason = f"{nvcc} is not of torch's CUDA {torch.version.cuda}"
    print(f"WARNING: lola-vllm: {reason}; the CUDA kernels are not built.", file=sys.stderr)
    return False


def extension() -> dict[str, Any]:
    """setup() arguments that build the extension; empty where it cannot be built."""
    compiler = os.environ.get("CXX", "").split()
    found = any(shutil.which(name) for name in (compiler[:1] or ["c++", "g++", "clang++"]))
    if not found:
        return without_extension(
            f"no C++ compiler found ({compiler[0] if compiler else 'c++, g++ or clang++'})",
            "apt-get install g++ (or set CXX), then install again",
        )
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        return without_extension(
            f"torch cannot be imported ({error})",
            "install torch first, then pip install --no-build-isolation",
        )

    sanitize = SANITIZE if os.environ.get("LOLA_VLLM_SANITIZE") == "1" else []
    cuda = cuda_toolkit()
    patterns = ("*.cpp", "*.cu") if cuda else ("*.cpp",)
    sources, headers = (
        sorted(str(p.relative_to(ROOT)) for name in names for p in (ROOT / "csrc").rglob(name))
        for names in (patterns, ("*.h", "*.cuh"))
    )
    return {
        "ext_modules": [
            (CUDAExtension if cuda else CppExtension)(
                "lola_vllm._C",
                sources,
                include_dirs=[str(ROOT / "csrc")],
                depends=headers,
                py_limited_api=True,
                # USE_CUDA: the stable ABI's headers declare torch's CUDA stream with it only.
                define_macros=[
                    ("TORCH_TARGET_VERSION", TORCH_TARGET),
                    *([("USE_CUDA", None)] if cuda else []),
                ],
                extra_compile_args={
                    # No -march: kernels choose their instruction set at run time (csrc/cpu).
                    # No contraction: csrc/cpu/simd.h says where products are fused. Vectors pass
                    # only between functions that are inlined, so their calling convention
                    # (psabi) is moot.
                    "cxx": ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno",
                            "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi",
                            "-Wno-unused-parameter", *sanitize],
                    "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden"],
                },
                extra_link_args=["-fsanitize=address,undefined"] if sanitize else [],
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": ABI_TAG}},
    }  # fmt: skip


names, folders = packages()
readme = ROOT / "README.md"
setup(
    packages=names,
    package_dir=folders,
    package_data={
        "lola_vllm": ["py.typed"],
        "lola_vllm.models": ["smollm2/*", "qwen2_5_coder/*"],  # maps and adapters
        "lola_vllm.serving": DATA,
    },
    exclude_package_data={"": ["README.md"]},  # of a folder: for readers of the repository
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    **extension(),
)
