"""Compile and link the CUDA kernels where there is no GPU, and print what each takes of one.

    python tools/compile_cuda.py --out build/cuda

Needs nvcc and any torch, a CPU build too: of torch only the stable ABI's headers are used. Every
.cu of csrc/cuda is compiled for each architecture and all are linked into one shared object. The
table gives registers and spilled bytes per thread and static shared memory per block, as ptxas
reports them (shared memory of these kernels is dynamic, its size follows from the shapes).

Fails where a source does not compile, or where a symbol is neither in torch's libraries nor one
that only a CUDA build of torch has. With `--decode` decode kernels of other dtypes are left out,
which take most of the time, and may be missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
ARCHS = ("80", "90", "100")
DTYPES = ("bf16", "f16", "f32")
# What only a CUDA build of torch defines.
CUDA_ONLY = {"aoti_torch_get_current_cuda_stream"}
TORCH = Path(torch.__file__).parent


def flags(archs: list[str]) -> list[str]:
    """nvcc's options, those of setup.py where they change code."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [
        "-std=c++20", "-O3", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", *codes, f"-I{ROOT / 'csrc'}",
        f"-I{TORCH / 'include'}",
    ]  # fmt: skip


def run(command: list[str]) -> str:
    """Output of a command, both streams; exits with it where the command fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{result.stdout}")
    return result.stdout


def demangle(name: str) -> str:
    """A kernel's name without namespaces and parameters."""
    full = run(["c++filt", name]).strip() if shutil.which("c++filt") else name
    full = full.replace("(anonymous namespace)::", "").replace("lola::cuda::", "")
    return full.removeprefix("void ").removesuffix("(Params)")


def parse(report: str) -> list[dict[str, Any]]:
    """What each kernel of a ptxas report takes."""
    found = []
    for block in report.split("Compiling entry function ")[1:]:
        name, arch = re.match(r"'(\w+)' for 'sm_(\w+)'", block).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        shared = re.search(r"Used .*?(\d+) bytes smem", block)
        row = {
            "name": demangle(name),
            "arch": arch,
            "registers": int(re.search(r"Used (\d+) registers", block).group(1)),
            "spill_stores": int(stores),
            "spill_loads": int(loads),
            "stack": int(stack),
            "shared": int(shared.group(1)) if shared else 0,
        }
        found.append(row)
    return found


def link(nvcc: str, objects: list[Path], out: Path) -> set[str]:
    """Link against torch's libraries; returns the symbols nobody defines."""
    report = run(
        [nvcc, "-shared", "-o", str(out / "lola_cuda.so"), *map(str, objects),
         f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10",
         "-Xlinker=-z,defs,--warn-unresolved-symbols"]
    )  # fmt: skip
    return set(re.findall(r"undefined reference to [`'](\w+)'", report))


def main() -> None:
    """Compile, link, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "cuda")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS))
    parser.add_argument("--decode", nargs="+", default=list(DTYPES), choices=DTYPES)
    args = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc is not installed, or not in PATH")
    args.out.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> tuple[Path, list[dict[str, Any]]]:
        target = args.out / f"{source.stem}.o"
        report = run([nvcc, *flags(args.archs), "-c", str(source), "-o", str(target)])
        return target, parse(report)

    left_out = {f"decode_{dtype}" for dtype in DTYPES if dtype not in args.decode}
    sources = sorted(p for p in (ROOT / "csrc/cuda").glob("*.cu") if p.stem not in left_out)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compile_one, sources))
    rows = sorted(
        (row for _, found in results for row in found),
        key=lambda row: (row["name"], int(row["arch"])),
    )
    unresolved = link(nvcc, [target for target, _ in results], args.out)
    (args.out / "table.json").write_text(json.dumps(rows, indent=1))

    width = max(len(row["name"]) for row in rows)
    print(f"{'kernel':{width}}" + "".join(f"{key:>14}" for key in list(rows[0])[1:]))
    for row in rows:
        name, *numbers = row.values()
        print(f"{name:{width}}" + "".join(f"{number:>14}" for number in numbers))
    print(f"{len(rows)} kernels of {len(sources)} sources, linked to {args.out / 'lola_cuda.so'}")
    unknown = {
        name for name in unresolved - CUDA_ONLY if not (left_out and "launch_decode" in name)
    }
    if unknown:
        sys.exit(f"undefined symbols: {', '.join(sorted(unknown))}")


if __name__ == "__main__":
    main()
