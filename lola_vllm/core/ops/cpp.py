"""The C++ CPU kernels: finds and loads `lola_vllm/_C*.so` once, and types its ops.

The extension is optional (setup.py goes on without a compiler); ask `load()` before using an op.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from lola_vllm.core.ops.contract import DecodeBatch, LayerState, PrefillBatch

logger = logging.getLogger("vllm.lola")

ISA_NAMES = ("baseline", "avx2", "avx512", "avx512_bf16")


@functools.cache
def load() -> bool:
    """Load the extension if it is there; later calls only repeat the answer.

    Returns:
        True where the ops are usable. False where the extension was not built, or where it was
        built but cannot be loaded (logged once, with the reason).
    """
    built = sorted(Path(__file__).parents[2].glob("_C*.so"), key=lambda p: p.stat().st_mtime)
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


def decode(
    layer: LayerState, q: Tensor, k: Tensor, v: Tensor, batch: DecodeBatch, out: Tensor
) -> None:
    """One new token per row, in one pass over the pages; see `contract.DecodeOp`.

    Raises:
        RuntimeError: a wrong shape, dtype or state index; the message names the argument.
    """
    torch.ops.lola.decode(*arguments(layer, q, k, v, batch, out))


def prefill(
    layer: LayerState, q: Tensor, k: Tensor, v: Tensor, batch: PrefillBatch, out: Tensor
) -> None:
    """A segment of new tokens per row, chunk by chunk; see `contract.PrefillOp`.

    Raises:
        RuntimeError: a wrong shape, dtype or state index; the message names the argument.
    """
    torch.ops.lola.prefill(*arguments(layer, q, k, v, batch, out))


def arguments(
    layer: LayerState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: DecodeBatch | PrefillBatch,
    out: Tensor,
) -> tuple[Tensor, ...]:
    """The arguments of the ops in `csrc/ops.h`, in their order."""
    w = layer.weights
    weights = (w.feature_map_q, w.key_maps, w.gates, w.importance)
    return (layer.pages, layer.table, layer.device_table, *weights, q, k, v, *batch, out)
