"""Bytes and flops of one sequence in one page: what each chunk of tokens reads, writes, computes.

A chunk is tokens that no update divides; a decode step is a chunk of one token. Everything is
counted per chunk, in float64 `[chunks]`. Symbols are those of `docs/algorithm.md`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.state import StateLayout

WINDOW, SPARSE, STATE = "window and sinks", "sparse K/V", "H and s"
TOKENS, SCORES, FOLDS = "new tokens", "scores", "folds"
BOUNDED_TILE = 16  # pairs whose errors are computed at least, where bounds rule out the others


class Work(NamedTuple):
    """bytes, flops: float64 `[chunks]`."""

    bytes: Tensor
    flops: Tensor


def attended(page: StateLayout, num_heads: int, starts: Tensor, lengths: Tensor) -> dict[str, Work]:
    """Answering the queries of chunks, and writing their pairs into the window.

    A chunk reads each pair and H once: query heads of a KV head share what is read.

    Args:
        num_heads: query heads of the page. starts: `[chunks]` int64, tokens before each chunk.
        lengths: `[chunks]` int64, its tokens.
    """
    d, F, item = page.head_dim, page.feature_dim, page.kv_dtype.itemsize
    sinks = starts.clamp(max=page.sink_size)
    window = sinks + (starts - page.window_start(starts)).clamp(min=0)
    cached = page.num_sparse(starts)
    folded = (page.num_folded(starts) > 0).double()
    tokens = lengths.double()
    pairs_seen = tokens * window + tokens * (tokens + 1) / 2
    # q is read and the answer written; k and v are read and written.
    token_bytes = (2 * num_heads + 4 * page.num_kv_heads) * d * item
    return {
        TOKENS: Work(tokens * token_bytes, torch.zeros_like(tokens)),
        WINDOW: Work(
            (window * page.num_kv_heads * 2 * d * item).double(), num_heads * 4 * d * pairs_seen
        ),
        SPARSE: Work(
            (cached * page.num_sparse_heads).double() * pair_bytes(page),
            num_heads * 4 * d * tokens * cached,
        ),
        # A query's map, its product with H and that with s.
        STATE: Work(
            folded * state_bytes(page), num_heads * folded * tokens * (2 * d * F + 4 * F * (d + 1))
        ),
    }


def updated(page: StateLayout, n: Tensor, *, skip_recent: bool) -> dict[str, Work]:
    """The updates after n tokens, `[chunks]` int64; nothing where none is due.

    Args:
        skip_recent: recent pairs are not scored, as they stay in any case.
    """
    d, F, lam = page.head_dim, page.feature_dim, page.sparse_cache_size
    before = n - page.update_interval
    due = page.update_due(n)
    arrived = (page.window_start(n) - page.window_start(before)) * due
    cached = page.num_sparse(before)
    candidates = (cached + arrived) * due
    overflows = (candidates > lam).double()
    pair, state = pair_bytes(page), state_bytes(page)

    scored = candidates.clone()
    if skip_recent:
        scored = (scored - page.recent_size).clamp(min=0)
    if page.keeps_bounds:
        scored = scored.clamp(max=BOUNDED_TILE)
    scored = scored.double() * (overflows if lam else 0.0)
    weight = 4 if page.has_score_weights else 0
    folds_before = (page.num_folded(before) > 0).double()
    # The key's map, its product with H and that with s, the distance to the value.
    error_flops = folds_before * (2 * d * F + 4 * F * (d + 1)) + 3 * d
    scores = scored * page.num_sparse_heads * (pair + weight)
    scores += folds_before * (scored > 0) * state
    if page.keeps_bounds:
        bounds = page.part_bytes["bounds"] + page.part_bytes["directions"]
        scores += (scored > 0) * bounds

    folded = (candidates - lam).clamp(min=0).double()
    fold_bytes = folded * page.num_sparse_heads * pair + 2.0 * (folded > 0) * state
    # At most as many pairs enter the cache as left the window; positions and scores are read.
    entering = arrived.clamp(max=lam).double()
    fold_bytes += page.num_sparse_heads * (2 * entering * pair + 8.0 * candidates)
    return {
        SCORES: Work(scores, scored * page.num_state_heads * error_flops),
        FOLDS: Work(fold_bytes, folded * page.num_state_heads * (2 * d * F + 4 * F * d + 2 * F)),
    }


def shift_work(page: StateLayout) -> tuple[float, float]:
    """Bytes and flops of a context shift: keys, H, s and score weights are read and written."""
    parts = page.part_bytes
    moved = ("exact_k", "sparse_k", "sparse_k_scale", "H", "s", "score_weights")
    keys = page.num_kv_heads * (page.sink_size + page.ring_size)
    keys += page.num_sparse_heads * page.sparse_cache_size
    flops = 3 * page.head_dim * keys + page.num_state_heads * 2 * page.feature_dim * page.head_dim
    return 2.0 * sum(parts[name] for name in moved) + parts["positions"], float(flops)


def chunks_of(page: StateLayout, tokens: int) -> tuple[Tensor, Tensor]:
    """Starts and lengths of the chunks of a prompt from an empty state, as `plan_chunks` of
    `kernels/chunks.py` cuts it: the first lasts until an update evicts something."""
    C = page.update_interval
    first = -(-(page.window_size + page.sink_size + 1) // C) * C
    starts = torch.tensor([0, *range(first, tokens, C)])
    return starts, torch.diff(starts, append=torch.tensor([tokens]))


def pair_bytes(page: StateLayout) -> int:
    """Of one pair of a sparse set, with its scales."""
    scales = 8 if page.int8_pairs else 0
    return 2 * page.head_dim * page.sparse_dtype.itemsize + scales


def state_bytes(page: StateLayout) -> int:
    """Of H and s."""
    return page.part_bytes["H"] + page.part_bytes["s"]


def map_bytes(page: StateLayout, num_heads: int) -> int:
    """Of the float32 maps of queries and keys, which all sequences share."""
    return (num_heads + page.num_state_heads) * page.head_dim * page.feature_dim * 4
