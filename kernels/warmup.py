"""Compiling at start-up what the first requests would otherwise wait for."""

from __future__ import annotations

import logging
import time

import torch

from lola_vllm.kernels import backend
from lola_vllm.kernels.decode import choose_splits
from lola_vllm.ops.contract import DecodeBatch, HeadGroup, LayerState, PrefillBatch, PrefillOp
from lola_vllm.state import StateLayout

logger = logging.getLogger("vllm.lola")

_compiled: set[tuple[PrefillOp, bool, StateLayout, int, torch.device]] = set()


def warm_up(layer: LayerState, prefill: PrefillOp = backend.prefill) -> None:
    """Launch every kernel variant that a layer's steps can ask for, on rows of padding alone.

    Such rows read and write no page. Head groups that are alike share their variants, so only the
    first of them takes time.

    Args:
        prefill: the back end's.
    """
    for group in layer.groups:
        _warm_up(group, prefill)


def _warm_up(group: HeadGroup, prefill: PrefillOp) -> None:
    device, layout, num_heads = group.pages.device, group.layout, group.weights.num_heads
    variants = (prefill, group.weights.subtract_max, layout, num_heads, device)
    if variants in _compiled:
        return
    _compiled.add(variants)
    begin = time.perf_counter()
    d, Hkv = layout.head_dim, layout.num_kv_heads
    # As in the model, queries, keys and values are parts of one product's rows.
    row = torch.zeros(1, num_heads + 2 * Hkv, d, dtype=layout.kv_dtype, device=device)
    q, k, v = row.split([num_heads, Hkv, Hkv], dim=1)
    out = torch.empty(1, num_heads, d, dtype=layout.kv_dtype, device=device)
    nobody = torch.zeros(1, dtype=torch.int32, device=device)
    layer, splits = group.alone(group.pages), choose_splits(layout, 1, device)
    while splits >= 1:  # powers of two: all that larger batches choose
        backend.decode(layer, q, k, v, DecodeBatch(nobody, nobody + 1), out, splits)
        splits //= 2
    batch = PrefillBatch(nobody, torch.tensor([0, 1]), torch.tensor([0]))
    prefill(layer, q, k, v, batch, out)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    logger.info("LoLA kernels are compiled, which took %.1f s", time.perf_counter() - begin)
