"""The dtype in which a CPU multiplies fast, and how much of its memory states may take.

`lola-vllm serve`, plain `vllm serve`, evaluations and the doctor all use these functions. Imports
neither torch nor vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
ISA_ENV = "LOLA_VLLM_CPU_ISA"
# CPU flags of x86 and Arm, as the Linux kernel names them. Without one of them, products in
# bfloat16 need conversions and take several times as long as in float32.
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
# Values of LOLA_VLLM_CPU_ISA for a CPU without these flags.
_WITHOUT = ("baseline", "avx2", "avx512")

GIB = 2**30
# Memory of Python, torch and vLLM: API server, engine and first rank; each further rank.
SERVER_BYTES = 3 * GIB
RANK_BYTES = GIB


def bfloat16_flag(env: Mapping[str, str] = os.environ) -> str | None:
    """The instructions with which this CPU multiplies bfloat16, None if it has none.

    Args:
        env: environment variables; LOLA_VLLM_CPU_ISA may name a CPU with fewer instructions.
    """
    if env.get(ISA_ENV) in _WITHOUT:
        return None
    flags = _flags()
    return next((flag for flag in BFLOAT16_FLAGS if flag in flags), None)


def preferred_dtype(config: Mapping[str, Any], env: Mapping[str, str] = os.environ) -> str | None:
    """The dtype in which this CPU runs a model fastest: "bfloat16" or "float32".

    Args:
        config: the model's `config.json`.

    Returns:
        None if vLLM should choose: weights are quantized, which often requires one dtype, or the
        CPU is of a kind whose instructions are not known here.
    """
    if "quantization_config" in config:
        return None
    if bfloat16_flag(env):
        return "bfloat16"
    return "float32" if env.get(ISA_ENV) in _WITHOUT or _flags() else None


def weight_bytes(files: int, config: Mapping[str, Any], dtype: str) -> int:
    """Bytes of a model's weights in memory.

    Args:
        files: bytes of its weight files. config: its `config.json`. dtype: that it runs in.
    """
    sizes = {"float16": 2, "bfloat16": 2, "float32": 4}
    stored = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if "quantization_config" in config or not {stored, dtype} <= set(sizes):
        return files
    return files * sizes[dtype] // sizes[stored]


def room_for_states(free: int, weights: int, ranks: int = 1, stored: int = 0) -> int:
    """Bytes that the states of one rank may take on a CPU.

    All ranks of a machine together take at most half of what weights and processes leave of the
    free memory, so that the machine stays usable. Stored states are in the other half, and more of
    them reduce the first.

    Args:
        free: memory that is free before the server starts, in bytes.
        weights: bytes of the weights, all ranks of this machine together.
        ranks: vLLM's workers on this machine. stored: bytes for stored states.
    """
    left = free - weights - SERVER_BYTES - (ranks - 1) * RANK_BYTES
    return max(0, min(left // 2, left - stored)) // ranks


def _flags() -> frozenset[str]:
    """Features of the first CPU; empty where the system does not tell."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
