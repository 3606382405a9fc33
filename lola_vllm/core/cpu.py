"""What the CPU is, the dtype in which it multiplies fast, and whether torch can compile for it.

`lola-vllm serve`, plain `vllm serve`, evaluations and the doctor all use these functions. Imports
neither torch nor vLLM.
"""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
ISA_ENV = "LOLA_VLLM_CPU_ISA"
# CPU flags of x86 and Arm, as the Linux kernel names them. Without one of them, products in
# bfloat16 need conversions and take several times as long as in float32.
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
COMPILERS = ("c++", "g++", "clang++")
# Values of LOLA_VLLM_CPU_ISA for a CPU without these flags.
_WITHOUT = ("baseline", "avx2", "avx512")


def bfloat16_flag(env: Mapping[str, str] = os.environ) -> str | None:
    """The instructions with which this CPU multiplies bfloat16, None if it has none.

    Args:
        env: environment variables; LOLA_VLLM_CPU_ISA may name a CPU with fewer instructions.
    """
    if env.get(ISA_ENV) in _WITHOUT:
        return None
    known = flags()
    return next((flag for flag in BFLOAT16_FLAGS if flag in known), None)


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
    return "float32" if env.get(ISA_ENV) in _WITHOUT or flags() else None


def missing_for_compiling(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What torch.compile needs on a CPU and this machine lacks, each with its package in Debian."""
    missing = {}
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing["Python.h"] = f"python{sysconfig.get_python_version()}-dev"
    if not any(map(shutil.which, env.get("CXX", "").split()[:1] or COMPILERS)):
        missing["a C++ compiler"] = "g++"
    return missing


def name() -> str:
    """The processor's own name."""
    return _fact("model name") or platform.processor() or platform.machine()


def flags() -> frozenset[str]:
    """Features of the first CPU; empty where the system does not tell."""
    return frozenset(_fact("flags", "Features").split())


def _fact(*names: str) -> str:
    """What the system says of the first CPU under one of these names; empty where it does not."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    facts = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in facts if key.strip() in names), "")
