"""Compile every kernel ahead of time, without a GPU, and print what each needs of one.

    python -m tools.compile_triton [--arch 80 90 100]

Shapes are those of Llama-3.1-8B in bfloat16 with H and s in float32. Registers and stack bytes
(what did not fit in registers) come from the machine code, shared memory from the compiler.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lola_vllm.core.ops.shift_schedule import SCORE_DECAY, SCORE_DECAY_SHIFTS, ShiftSchedule
from lola_vllm.core.state import LayerLayout, StateLayout
from lola_vllm.kernels import attend, decode, prefill, shift, update
from lola_vllm.kernels.candidates import BLOCK_R
from lola_vllm.kernels.layer import layer_shape, precision

ARCHS = (80, 90, 100)
# Bytes of shared memory that one program may have (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTER_TYPES = {
    "pages_ptr": "*u8",
    "table_ptr": "*i64",
    "rows_ptr": "*i32",
    "state_indices_ptr": "*i32",
    "n_ptr": "*i32",
    "lists_ptr": "*i32",
    "listed_ptr": "*i32",
    "kept_positions_ptr": "*i32",
}
MODEL_POINTERS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "soft_ptr")  # others are of float32
FLOATS = ("scale", "decay", "score_decay")
ROTATED_MAP_AFTER = 8192  # of models with a rotated key map


@dataclass(frozen=True)
class Kernel:
    """One kernel at one shape: the function, its compile-time arguments and its warps."""

    name: str
    function: Any
    constants: dict[str, Any]
    num_warps: int


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs: registers per thread, and bytes of stack and shared memory."""

    kernel: str
    arch: int
    num_warps: int
    registers: int
    stack: int
    shared: int
    cubin: bytes = field(repr=False)


def llama_8b() -> LayerLayout:
    """A layer of Llama-3.1-8B: 32 query and 8 KV heads of 128, window 64, F 64, bfloat16."""
    page = StateLayout(
        window_size=64, sparse_cache_size=512, update_interval=64, sink_size=0,
        num_kv_heads=8, num_state_heads=8, num_sparse_heads=8,
        head_dim=128, feature_dim=64, kv_dtype=torch.bfloat16, state_dtype=torch.float32,
    )  # fmt: skip
    return LayerLayout((page,))


def kernels(layout: LayerLayout, Hq: int = 32) -> list[Kernel]:
    """Every kernel of the Triton back end as it is launched for a layout.

    Updates also as where each token is followed by one, and as where scores are weighted. All that
    reads sparse pairs also as where these are int8, with scores weighted.
    """
    weighted = _with(layout, has_score_weights=True)
    small = _with(weighted, int8_pairs=True)
    kv_dtype = layout.pages[0].kv_dtype
    read = {"PRECISION": precision(kv_dtype)}
    mixing = False, False  # what most models have

    def decoding(own: LayerLayout, split: bool, note: str) -> Kernel:
        constants = {**decode.decode_constants(own, Hq, split, False), **read}
        return Kernel("decode" + note, decode.decode_kernel, constants, decode.NUM_WARPS)

    def reading(own: LayerLayout, partial: bool, note: str, apart: bool = False) -> Kernel:
        constants = prefill.prefill_constants(own, Hq, mixing, partial, ROTATED_MAP_AFTER, apart)
        name = "prefill" + note
        return Kernel(name, prefill.prefill_kernel, {**constants, **read}, prefill.NUM_WARPS)

    def attending(own: LayerLayout, note: str) -> Kernel:
        constants = {**prefill.attend_constants(own, Hq, mixing), **read}
        return Kernel("attend" + note, attend.attend_kernel, constants, attend.NUM_WARPS)

    def shifting(own: LayerLayout, note: str) -> Kernel:
        schedule = ShiftSchedule(2048, 512, SCORE_DECAY, SCORE_DECAY_SHIFTS, bucket_start=768)
        d = own.pages[0].head_dim
        constants = {
            "SHAPE": layer_shape(own, Hq, ROTATED_MAP_AFTER),
            "SCHEDULE": shift.shift_shape(schedule, d // 2, d),
            "BLOCK_N": shift.BLOCK_N,
        }
        return Kernel("shift" + note, shift.shift_kernel, constants, shift.NUM_WARPS)

    return [
        decoding(layout, False, ""),
        decoding(layout, True, ", split"),
        reading(layout, False, ""),
        reading(layout, True, ", partial"),
        reading(layout, False, ", apart", True),
        attending(layout, ""),
        *update_kernels(layout, Hq),
        *update_kernels(weighted, Hq, ", weighted"),
        decoding(small, False, ", int8"),
        reading(small, False, ", int8"),
        reading(small, False, ", apart, int8", True),
        attending(small, ", int8"),
        *update_kernels(small, Hq, ", int8"),
        shifting(layout, ""),
        shifting(small, ", int8"),
    ]


def update_kernels(layout: LayerLayout, Hq: int, note: str = "") -> list[Kernel]:
    """Those of an update; `note` ends their names."""
    shape = {
        "SHAPE": layer_shape(layout, Hq, ROTATED_MAP_AFTER),
        "BLOCK_R": BLOCK_R,
        "PRECISION": update.PRECISION,
    }
    scores = {**shape, "BLOCK_E": update.score_block(layout)}
    folds = {**shape, **update.fold_constants(layout), **update.join_constants(False)}
    return [
        Kernel("score" + note, update.score_kernel, scores, update.SCORE_WARPS),
        Kernel("fold" + note, update.fold_kernel, folds, update.FOLD_WARPS),
    ]


def _with(layout: LayerLayout, **fields: Any) -> LayerLayout:
    """The layout with other fields of its pages."""
    return LayerLayout(tuple(replace(page, **fields) for page in layout.pages))


def source(kernel: Kernel) -> ASTSource:
    """The kernel with the argument types and alignments that a launch would give it."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.function.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            continue
        if name.endswith("_ptr"):
            usual = "*bf16" if name in MODEL_POINTERS else "*fp32"
            signature[name] = POINTER_TYPES.get(name, usual)
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if name not in FLOATS and not free:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel.function, signature, dict(kernel.constants), attributes)


def compile_kernel(kernel: Kernel, arch: int) -> Usage:
    """Compile to machine code for sm_<arch> and read what it needs.

    Raises:
        RuntimeError: the machine code could not be read.
    """
    compiled = triton.compile(
        source(kernel),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": kernel.num_warps},
    )
    cubin = compiled.asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", text)  # of the kernel, and functions it calls
    if not found:
        raise RuntimeError(f"{kernel.name}, sm_{arch}: no resource usage in {text!r}")
    return Usage(
        kernel.name, arch, kernel.num_warps, max(int(regs) for regs, _ in found),
        max(int(stack) for _, stack in found),
        int(compiled.metadata.shared), cubin,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of every kernel on every architecture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS))
    options = parser.parse_args(arguments)
    layout = llama_8b()
    print("| kernel | arch | warps | registers | stack bytes | shared bytes | seconds |")
    print("|---|---|---|---|---|---|---|")
    for kernel in kernels(layout):
        for arch in options.arch:
            begin = time.process_time()
            u = compile_kernel(kernel, arch)
            seconds = time.process_time() - begin
            print(
                f"| {u.kernel} | sm_{arch} | {u.num_warps} | {u.registers} | {u.stack} "
                f"| {u.shared} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
