"""Compile every kernel ahead of time, without a GPU, and print what each needs of one.

    python -m lola_vllm.kernels.aot [--arch 80 90 100] [--sparse 512]

Shapes are those of Llama-3.1-8B in bfloat16 with H and s in float32. Registers and stack bytes
(what did not fit in registers) come from the machine code, shared memory from the compiler.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lola_vllm.kernels import decode, prefill, update, update_per_token
from lola_vllm.kernels.candidates import BLOCK_R
from lola_vllm.kernels.common import page_shape, precision
from lola_vllm.state import StateLayout

ARCHS = (80, 90, 100)
# Bytes of shared memory that one program may have (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTER_TYPES = {
    "h_ptr": "*fp32",
    "s_ptr": "*fp32",
    "gate_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "scores_ptr": "*fp32",
    "ws_ptr": "*fp32",
    "score_weights_ptr": "*fp32",
    "k_scale_ptr": "*fp32",
    "v_scale_ptr": "*fp32",
    "bounds_ptr": "*fp32",
    "directions_ptr": "*i8",
    "doubtful_ptr": "*i32",
    "fresh_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "state_indices_ptr": "*i32",
    "n_ptr": "*i32",
    "lists_ptr": "*i32",
    "chunks_ptr": "*i32",
    "positions_ptr": "*i32",
}
ROTATED_MAP_AFTER = 8192  # of models with a rotated key map
UNIT_STRIDES = ("state_indices_stride", "n_stride")  # 1 at run time, which Triton makes a constant


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


def llama_8b(sparse_cache_size: int = 512, num_state_heads: int = 8) -> StateLayout:
    """The page of Llama-3.1-8B: 32 query and 8 KV heads of 128, window 64, F 64, bfloat16."""
    return StateLayout(
        window_size=64, sparse_cache_size=sparse_cache_size, update_interval=64, sink_size=0,
        num_kv_heads=8, num_state_heads=num_state_heads, num_sparse_heads=num_state_heads,
        head_dim=128, feature_dim=64, kv_dtype=torch.bfloat16, state_dtype=torch.float32,
    )  # fmt: skip


def kernels(layout: StateLayout, Hq: int = 32, splits: int = 8) -> list[Kernel]:
    """Every kernel of the Triton back end as it is launched for a layout.

    Updates also as where each token is followed by one, and as where scores are weighted. All that
    reads sparse pairs also as where these are int8, with scores weighted.
    """
    small = replace(layout, int8_pairs=True)
    read = {"PRECISION": precision(layout.kv_dtype)}
    whole = decode.decode_constants(layout, Hq, 1, False)
    split = decode.decode_constants(layout, Hq, splits, False)
    merge = decode.merge_constants(layout, Hq, splits, False)
    whole_prefill = prefill.prefill_constants(layout, Hq, False, partial=False)
    partial_prefill = prefill.prefill_constants(layout, Hq, False, partial=True)
    return [
        Kernel("decode", decode.decode_kernel, {**whole, **read}, decode.NUM_WARPS),
        Kernel("decode, split", decode.decode_kernel, {**split, **read}, decode.NUM_WARPS),
        Kernel("merge", decode.merge_kernel, merge, decode.NUM_WARPS),
        Kernel("prefill", prefill.prefill_kernel, {**whole_prefill, **read}, prefill.NUM_WARPS),
        Kernel(
            "prefill, partial",
            prefill.prefill_kernel,
            {**partial_prefill, **read},
            prefill.NUM_WARPS,
        ),
        *update_kernels(layout),
        *update_kernels(replace(layout, has_score_weights=True), ", weighted"),
        Kernel(
            "decode, int8",
            decode.decode_kernel,
            {**decode.decode_constants(small, Hq, 1, False), **read},
            decode.NUM_WARPS,
        ),
        Kernel(
            "prefill, int8",
            prefill.prefill_kernel,
            {**prefill.prefill_constants(small, Hq, False, partial=False), **read},
            prefill.NUM_WARPS,
        ),
        *update_kernels(replace(small, has_score_weights=True), ", int8"),
    ]


def update_kernels(layout: StateLayout, note: str = "") -> list[Kernel]:
    """Those of an update, whatever the interval; `note` ends their names."""
    blocks = {"BLOCK_R": BLOCK_R, "PRECISION": update.PRECISION}
    each = replace(layout, update_interval=1)  # an update after every token
    shape = {"SHAPE": page_shape(layout, ROTATED_MAP_AFTER), **blocks}
    each_shape = {"SHAPE": page_shape(each, ROTATED_MAP_AFTER), **blocks}
    return [
        Kernel(
            "score" + note,
            update.score_kernel,
            {**shape, "BLOCK_E": update.BLOCK_E},
            update.SCORE_WARPS,
        ),
        Kernel(
            "fold" + note,
            update.fold_kernel,
            {**shape, **update.fold_constants(layout)},
            update.FOLD_WARPS,
        ),
        Kernel(
            "score, per token" + note,
            update_per_token.per_token_score_kernel,
            {**each_shape, **update.per_token_constants(each)},
            update_per_token.SCORE_WARPS,
        ),
        Kernel(
            "fold, per token" + note,
            update.fold_kernel,
            {**each_shape, **update.fold_constants(each)},
            update.FOLD_WARPS,
        ),
    ]


def source(kernel: Kernel) -> ASTSource:
    """The kernel with the argument types and alignments that a launch would give it."""
    signature: dict[str, str] = {}
    constexprs = dict(kernel.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.function.params):
        name = parameter.name
        if name in UNIT_STRIDES:
            constexprs[name] = 1
        if parameter.is_constexpr or name in UNIT_STRIDES:
            signature[name] = "constexpr"
            continue
        if name.endswith("_ptr"):
            int8 = name.startswith("sparse_") and kernel.constants["SHAPE"].INT8_PAIRS
            signature[name] = "*i8" if int8 else POINTER_TYPES.get(name, "*bf16")
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if name != "scale" and not free:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel.function, signature, constexprs, attributes)


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
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"{kernel.name}, sm_{arch}: no resource usage in {text!r}")
    return Usage(
        kernel.name, arch, kernel.num_warps, int(found[1]), int(found[2]),
        int(compiled.metadata.shared), cubin,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of every kernel on every architecture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--sparse", type=int, default=512, help="sparse cache size, lambda")
    parser.add_argument("--state-heads", type=int, choices=(8, 32), default=8)
    options = parser.parse_args(arguments)
    layout = llama_8b(options.sparse, options.state_heads)
    print("| kernel | arch | warps | registers | stack bytes | shared bytes |")
    print("|---|---|---|---|---|---|")
    for kernel in kernels(layout):
        for arch in options.arch:
            u = compile_kernel(kernel, arch)
            print(
                f"| {u.kernel} | sm_{arch} | {u.num_warps} | {u.registers} | {u.stack} "
                f"| {u.shared} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
