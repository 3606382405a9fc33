"""How `csrc/cuda/lola.cu` divides a decode step of a layer: launches, and blocks for each row."""

from __future__ import annotations

from lola_vllm.gpu_cost.gpus import Gpu
from lola_vllm.state import LayerLayout, StateLayout

# As in lola.cu.
BLOCKS_PER_PROCESSOR, SCORE_BATCH, MAX_SCORE_BLOCKS = 2, 32, 4096
# Digits of a key by which `select.cuh` narrows the candidates down, at most; and instructions that
# each of them takes of a candidate.
SELECT_PASSES, SELECT_INSTRUCTIONS = 8, 8


def decode_launches(layer: LayerLayout) -> int:
    """Kernels of a decode step, for all heads: features, attention and update, whose blocks join
    splits; and the update per token, where heads have both kinds of updates."""
    return 2 + len({updates_per_token(page) for page in layer.pages})


def updates_per_token(page: StateLayout) -> bool:
    """Whether `update_per_token.cu` does the updates of a head group."""
    return page.update_interval == 1 and not page.recent_size


def score_parts(layer: LayerLayout, batch: int, gpu: Gpu) -> int:
    """Blocks that share the scores of a row and set (`plan_scores`)."""
    sets, interval = len(layer.sizes), layer.pages[0].update_interval
    due = max(batch * sets // interval, sets)
    candidates = max(page.sparse_cache_size for page in layer.pages) + interval
    most = max(1, min(-(-candidates // SCORE_BATCH), MAX_SCORE_BLOCKS // (batch * sets)))
    return min(max(1, -(-BLOCKS_PER_PROCESSOR * gpu.processors // due)), most)
