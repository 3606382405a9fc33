"""The C++ CPU kernels: finds and loads `lola_vllm/_C*.so` once, and types its ops.

The extension is optional (setup.py goes on without a compiler); ask `load()` before using an op.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from lola_vllm.ops.contract import DecodeBatch, PrefillBatch, State

logger = logging.getLogger("vllm.lola")

_NO_IMPORTANCE = torch.empty(0)  # in the place of weights that a layer does not have
ISA_NAMES = ("baseline", "avx2", "avx512", "avx512_bf16")


@functools.cache
def load() -> bool:
    """Load the extension if it is there; later calls only repeat the answer.

    Returns:
        True where the ops are usable. False where the extension was not built, or where it was
        built but cannot be loaded (logged once, with the reason).
    """
    built = sorted(Path(__file__).parent.parent.glob("_C*.so"), key=lambda p: p.stat().st_mtime)
    if not built:
        return False
    try:
        torch.ops.load_library(str(built[-1]))
    except OSError as error:  # built for a torch without the symbols it needs
        logger.warning("LoLA C++ kernels at %s cannot be loaded: %s", built[-1], error)
        return False
    return True


def cpu_isa() -> str:
    """Instruction set of the CPU kernels: "baseline", "avx2", "avx512" or "avx512_bf16".

    The best this machine has, or what the environment variable LOLA_VLLM_CPU_ISA named when the
    first kernel ran, if the machine has it. Needs `load()`.
    """
    return ISA_NAMES[torch.ops.lola.cpu_isa_level()]


def decode(state: State, q: Tensor, k: Tensor, v: Tensor, batch: DecodeBatch, out: Tensor) -> None:
    """One new token per row, in one pass over the pages; see `contract.DecodeOp`.

    Raises:
        RuntimeError: a wrong shape, dtype or state index; the message names the argument.
    """
    torch.ops.lola.decode(*arguments(state, q, k, v, batch, out))


def prefill(
    state: State, q: Tensor, k: Tensor, v: Tensor, batch: PrefillBatch, out: Tensor
) -> None:
    """A segment of new tokens per row, chunk by chunk; see `contract.PrefillOp`.

    Raises:
        RuntimeError: a wrong shape, dtype or state index; the message names the argument.
    """
    torch.ops.lola.prefill(*arguments(state, q, k, v, batch, out))


def arguments(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: DecodeBatch | PrefillBatch,
    out: Tensor,
) -> tuple[Tensor, ...]:
    """The arguments of the ops in `csrc/ops.h`, in their order."""
    weights = state.weights
    assert weights.key_maps is not None
    maps = (weights.feature_map_q, weights.key_maps, weights.log_gate)
    importance = _NO_IMPORTANCE if weights.importance is None else weights.importance
    return (state.pages, state.table, *maps, importance, q, k, v, *batch, out)
