"""Compiling at start-up what the first requests would otherwise wait for."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from lola_vllm.core.ops.contract import DecodeBatch, LayerState, PrefillBatch, PrefillOp
from lola_vllm.kernels import backend
from lola_vllm.kernels.attend import attends_apart
from lola_vllm.kernels.layer import layer_shape
from lola_vllm.kernels.shift import shift_layers
from lola_vllm.kernels.splits import choose_splits
from lola_vllm.kernels.update import has_scores

logger = logging.getLogger("vllm.lola")

_compiled: set[tuple[Any, ...]] = set()


def warm_up(layer: LayerState, prefill: PrefillOp = backend.prefill) -> None:
    """Launch every kernel variant that a layer's steps can ask for, on rows of padding alone.

    Such rows read and write no page. Layers that differ in the sizes of their sparse sets alone
    share their variants, so only the first of them takes time.

    Args:
        prefill: the back end's.
    """
    device, layout, weights = layer.pages.device, layer.layout, layer.weights
    num_heads, page = weights.num_heads, layout.pages[0]
    splits = choose_splits(layout, 1, device)
    apart = attends_apart(layout, 1, 2, device)
    variants = (
        prefill, weights.subtract_max, weights.has_sinks,
        layer_shape(layout, num_heads, weights.rotated_map_after), splits > 1, apart,
        has_scores(layout), device,
    )  # fmt: skip
    if variants in _compiled:
        return
    _compiled.add(variants)
    begin = time.perf_counter()
    d, Hkv = page.head_dim, layout.num_kv_heads
    # As in the model, queries, keys and values are parts of one product's rows.
    row = torch.zeros(1, num_heads + 2 * Hkv, d, dtype=page.kv_dtype, device=device)
    q, k, v = row.split([num_heads, Hkv, Hkv], dim=1)
    out = torch.empty(1, num_heads, d, dtype=page.kv_dtype, device=device)
    nobody = torch.zeros(1, dtype=torch.int32, device=device)
    for parts in {splits, 1}:
        backend.decode(layer, q, k, v, DecodeBatch(nobody, nobody + 1), out, parts)
    batch = PrefillBatch(nobody, torch.tensor([0, 1]), torch.tensor([0]))
    prefill(layer, q, k, v, batch, out)
    if apart:
        backend.prefill(layer, q, k, v, batch, out, apart=True)
    if weights.rotation is not None:
        shift_layers([layer], nobody, nobody.long())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    logger.info("LoLA kernels are compiled, which took %.1f s", time.perf_counter() - begin)
