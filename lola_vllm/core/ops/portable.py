"""The portable back end: LoLA's ops in plain torch, vectorized over the rows of a batch.

No loop runs over sequences or heads. Decode is the one-token case of the same step that prefill
repeats for every chunk of a prompt. Sums are made in float32 (float64 for float64 inputs).

Symbols: B rows; L tokens of a chunk; Hq, Hkv, Hs, Hg query, KV and state heads and sparse sets; d
`head_dim`; F `feature_dim`; E candidates of an update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lola_vllm.core.ops.constants import MAX_CHUNK, RECALL_EPS
from lola_vllm.core.ops.contract import DecodeBatch, HeadGroup, PrefillBatch
from lola_vllm.core.ops.dither import add_dithered, dither
from lola_vllm.core.ops.int8 import Int8Rows, quantize
from lola_vllm.core.ops.per_group import per_group
from lola_vllm.core.ops.reference import feature_map, pair_importance
from lola_vllm.core.state import StateLayout, StateViews


def recall_errors(
    k: Tensor,
    v: Tensor,
    feature_map_k: Tensor,
    H: Tensor,
    s: Tensor,
    state_indices: Tensor,
    empty: Tensor,
) -> Tensor:
    """Self-recall errors of candidates against their pages' hidden states (paper, section 3.2).

    Args:
        k, v: `[B, Hg, E, d]`, k after RoPE. feature_map_k: `[Hs, d, F]`, or one for each row.
        H: `[N, Hs, 2F, d]`. s: `[N, Hs, 2F]`. state_indices: `[B]`, the page of each row. F = 0:
            there is no hidden state, and the prediction is 0.
        empty: `[B]`, bool; the state counts as zero and is not read.

    Returns:
        `[B, Hg, E]`: the SRE where Hg = Hs, else the mean over the state heads of a sparse set of
        SRE / ||v||.
    """
    dtype = compute_dtype(k)
    B, Hg, E, _ = k.shape
    Hs = feature_map_k.shape[-3]
    v = v.to(dtype)
    k_s = k.to(dtype).repeat_interleave(Hs // Hg, dim=1)  # [B, Hs, E, d]
    v_s = v.repeat_interleave(Hs // Hg, dim=1)
    phi = feature_map(k_s, feature_map_k.to(dtype))  # [B, Hs, E, 2F]
    H_rows, s_rows = _gather_state(H, s, state_indices, empty, dtype)
    predicted = (phi @ H_rows) / (phi @ s_rows.unsqueeze(-1) + RECALL_EPS)
    errors = (v_s - predicted).norm(dim=-1).view(B, Hg, Hs // Hg, E)
    if Hs == Hg:
        return errors[:, :, 0]
    return (errors / v.norm(dim=-1).clamp(min=RECALL_EPS).unsqueeze(2)).mean(2)


@per_group
def decode(
    group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, batch: DecodeBatch, out: Tensor
) -> None:
    """One new token per row; see `contract.DecodeOp`."""
    positions, ones = batch.seq_lens - 1, torch.ones_like(batch.seq_lens)
    rows = (batch.state_indices > 0).nonzero().squeeze(1)
    if len(rows) == len(batch.state_indices):
        chunk = Chunk(batch.state_indices, positions, ones)
        _step(group, q[:, None], k[:, None], v[:, None], chunk, out[:, None])
        return
    live = torch.zeros_like(out[rows])  # padding: compute on the live rows only
    if len(rows):
        chunk = Chunk(batch.state_indices[rows], positions[rows], ones[rows])
        _step(group, q[rows, None], k[rows, None], v[rows, None], chunk, live[:, None])
    out.zero_()
    out[rows] = live


@per_group
def prefill(
    group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, batch: PrefillBatch, out: Tensor
) -> None:
    """A segment of new tokens per row; see `contract.PrefillOp`.

    Each row is cut at the update points of the absolute grid; chunk i of all rows is one step.
    """
    state_indices, starts, context_lens = (x.tolist() for x in batch)
    chunks_of_row = [
        _chunks(n, end - start, group.layout.update_interval) if state_index > 0 else []
        for state_index, n, start, end in zip(
            state_indices, context_lens, starts[:-1], starts[1:], strict=True
        )
    ]
    for row, state_index in enumerate(state_indices):
        if state_index <= 0:
            out[starts[row] : starts[row + 1]] = 0

    for i in range(max(map(len, chunks_of_row), default=0)):
        rows = [r for r, chunks in enumerate(chunks_of_row) if i < len(chunks)]
        positions = torch.tensor([chunks_of_row[r][i][0] for r in rows], device=q.device)
        lengths = torch.tensor([chunks_of_row[r][i][1] for r in rows], device=q.device)
        first = torch.tensor(
            [starts[r] - context_lens[r] + chunks_of_row[r][i][0] for r in rows], device=q.device
        )
        columns = torch.arange(int(lengths.max()), device=q.device)
        valid = columns < lengths[:, None]
        tokens = torch.where(valid, first[:, None] + columns, first[:, None])  # [B, L]
        answers = torch.empty_like(q[tokens])
        chunk = Chunk(batch.state_indices[rows], positions, lengths)
        _step(group, q[tokens], k[tokens], v[tokens], chunk, answers)
        out[tokens[valid]] = answers[valid]


def _chunks(context_len: int, num_tokens: int, update_interval: int) -> list[tuple[int, int]]:
    """Cut a segment at the update points: (position, length) of each chunk."""
    chunks, position, end = [], context_len, context_len + num_tokens
    while position < end:
        stop = min(end, (position // update_interval + 1) * update_interval, position + MAX_CHUNK)
        chunks.append((position, stop - position))
        position = stop
    return chunks


def compute_dtype(x: Tensor) -> torch.dtype:
    """Sums are made in float32, or float64 where the inputs are."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Chunk:
    """New tokens of each row, all of a row within one update interval.

    Attributes:
        state_indices: `[B]`, pages. positions: `[B]`, of each row's first new token, so the tokens
            before it. lengths: `[B]`, new tokens. All int64 on the pages' device.
    """

    state_indices: Tensor
    positions: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        for name in ("state_indices", "positions", "lengths"):
            object.__setattr__(self, name, getattr(self, name).long())

    @property
    def seq_lens(self) -> Tensor:
        """`[B]`, tokens of each row with the new ones."""
        return self.positions + self.lengths


def _step(group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, out: Tensor) -> None:
    """One chunk per row: write, attend, update where it is due.

    Args:
        q: `[B, L, Hq, d]`; k, v: `[B, L, Hkv, d]`; columns past a row's length are padding.
        out: `[B, L, Hq, d]`, written; padding columns get values without meaning.
    """
    columns = torch.arange(q.shape[1], device=q.device)
    query_positions = chunk.positions[:, None] + columns  # [B, L]
    _write(group, k, v, chunk, query_positions)
    out.copy_(_attend(group, q, chunk, query_positions))
    n = chunk.seq_lens
    due = group.layout.update_due(n).nonzero().squeeze(1)
    if len(due):
        _update(group, chunk.state_indices[due], n[due])


def _write(group: HeadGroup, k: Tensor, v: Tensor, chunk: Chunk, query_positions: Tensor) -> None:
    columns = torch.arange(k.shape[1], device=k.device)
    b, col = (columns < chunk.lengths[:, None]).nonzero(as_tuple=True)
    page, row = chunk.state_indices[b], group.layout.row(query_positions[b, col])
    group.views.exact_k[page, :, row] = k[b, col]
    group.views.exact_v[page, :, row] = v[b, col]


def _attend(group: HeadGroup, q: Tensor, chunk: Chunk, query_positions: Tensor) -> Tensor:
    """Answers `[B, L, Hq, d]` to the queries of a chunk, its own pairs already written."""
    dtype = compute_dtype(q)
    B, L, Hq, d = q.shape
    queries = q.to(dtype).transpose(1, 2)  # [B, Hq, L, d]
    layout, views, weights = group.layout, group.views, group.weights
    state_indices, positions, n = chunk.state_indices, chunk.positions, chunk.seq_lens

    def per_head(x: Tensor, heads: int) -> Tensor:
        """Query heads `[B, Hq, L, n]` under the heads they read: `[B, heads, Hq/heads L, n]`."""
        return x.reshape(B, heads, Hq // heads * L, x.shape[-1])

    # Only the rows that some sequence of the batch has filled.
    exact_rows = min(layout.sink_size + layout.ring_size, layout.sink_size + int(n.max()))
    num_sparse = layout.num_sparse(positions)
    sparse_rows = int(num_sparse.max())
    exact_k = views.exact_k[state_indices, :, :exact_rows].to(dtype)
    exact_v = views.exact_v[state_indices, :, :exact_rows].to(dtype)
    sparse_k, sparse_v = sparse_pairs(layout, views, state_indices, sparse_rows, dtype)

    held, held_ok = _held_positions(layout, positions, n, exact_rows)  # [B, R]
    exact_ok = held_ok[:, None] & (held[:, None] <= query_positions[..., None])  # [B, L, R]
    sparse_ok = torch.arange(sparse_rows, device=q.device) < num_sparse[:, None]  # [B, S]
    # Leftovers of an earlier user may be NaN, and 0 * NaN is NaN: clear what is not valid.
    exact_v = exact_v.masked_fill(~held_ok[:, None, :, None], 0)
    sparse_v = sparse_v.masked_fill(~sparse_ok[:, None, :, None], 0)

    scale = d**-0.5
    exact = per_head(queries, exact_k.shape[1]) @ exact_k.mT * scale
    sparse = per_head(queries, sparse_k.shape[1]) @ sparse_k.mT * scale
    logits = torch.cat(
        [
            exact.view(B, Hq, L, -1).masked_fill(~exact_ok[:, None], -torch.inf),
            sparse.view(B, Hq, L, -1).masked_fill(~sparse_ok[:, None, None], -torch.inf),
        ],
        dim=-1,
    )
    log_gate, sink = weights.gates.to(dtype)[:, :, None].unbind(1)  # [Hq, 1]
    lse = torch.logaddexp(logits.logsumexp(-1), sink)  # [B, Hq, L]
    p_exact, p_sparse = (logits - lse.unsqueeze(-1)).exp().split([exact_rows, sparse_rows], dim=-1)
    y = (per_head(p_exact, exact_v.shape[1]) @ exact_v).view(B, Hq, L, d)
    y = y + (per_head(p_sparse, sparse_v.shape[1]) @ sparse_v).view(B, Hq, L, d)

    empty = layout.num_folded(positions) == 0
    if not bool(empty.all()):
        H, s = _gather_state(views.H, views.s, state_indices, empty, dtype)
        phi_q = feature_map(queries, weights.feature_map_q.to(dtype))  # [B, Hq, L, 2F]
        phi_q = per_head(phi_q, H.shape[1])
        D = (phi_q @ s.unsqueeze(-1)).view(B, Hq, L)
        y_lin = (phi_q @ H).view(B, Hq, L, d) / D.unsqueeze(-1)
        if weights.subtract_max:
            lse = lse - logits.amax(-1)
        r = torch.sigmoid(lse + log_gate - D.log()).unsqueeze(-1)
        y = torch.where(empty[:, None, None, None], y, r * y + (1 - r) * y_lin)
    return y.transpose(1, 2)


def _held_positions(
    layout: StateLayout, positions: Tensor, n: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Position that each row of the exact store holds after n tokens, and whether it is live.

    Both `[B, rows]`. Live: a pinned sink, or in the window of a query at `positions`, at which the
    chunk starts (the window's start does not move within an update interval).
    """
    row = torch.arange(rows, device=n.device)
    is_sink = row < layout.sink_size
    last = n[:, None] - 1
    ring = last - (last - (row - layout.sink_size)) % layout.ring_size
    held = torch.where(is_sink, row, ring)
    first = torch.where(is_sink, 0, layout.window_start(positions)[:, None])
    return held, (held >= first) & (held < n[:, None])


def sparse_pairs(
    layout: StateLayout, views: StateViews, state_indices: Tensor, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, Hg, rows, d]` of the first `rows` sparse entries of pages `state_indices
    [B]`."""
    k, v = views.sparse_k[state_indices, :, :rows], views.sparse_v[state_indices, :, :rows]
    if not layout.int8_pairs:
        return k.to(dtype), v.to(dtype)
    k_scale, v_scale = (
        views.sparse_k_scale[state_indices, :, :rows],
        views.sparse_v_scale[state_indices, :, :rows],
    )
    return Int8Rows(k, k_scale).to(dtype), Int8Rows(v, v_scale).to(dtype)


def _gather_state(
    H: Tensor, s: Tensor, state_indices: Tensor, empty: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """H `[B, Hs, 2F, d]` and s `[B, Hs, 2F]` of the rows, zero where nothing was folded in yet."""
    H_rows = H[state_indices].to(dtype).masked_fill(empty[:, None, None, None], 0)
    s_rows = s[state_indices].to(dtype).masked_fill(empty[:, None, None], 0)
    return H_rows, s_rows


def _update(group: HeadGroup, state_indices: Tensor, n: Tensor) -> None:
    """Evict, rescore, select, fold (paper section 3.3) in pages that just reached n tokens.

    Every page loses at least one pair from its window. All cached and evicted pairs are scored
    against H and s as before this update; the lam largest stay exact, the rest are folded in.
    """
    layout, views = group.layout, group.views
    C, lam, Hg = layout.update_interval, layout.sparse_cache_size, layout.num_sparse_heads
    start, stop = layout.window_start(n - C), layout.window_start(n)
    x_positions = start[:, None] + torch.arange(C, device=n.device)  # [B, C]
    x_ok = x_positions < stop[:, None]
    rows = layout.row(torch.where(x_ok, x_positions, start[:, None]))
    sets_per_kv_head = Hg // layout.num_kv_heads
    dtype = compute_dtype(views.exact_k)
    new = [
        exact[state_indices[:, None], :, rows]
        .transpose(1, 2)
        .repeat_interleave(sets_per_kv_head, dim=1)
        for exact in (views.exact_k, views.exact_v)
    ]
    new_k, new_v = (quantize(x) if layout.int8_pairs else x for x in new)  # as the page keeps them
    x_k, x_v = new_k.to(dtype), new_v.to(dtype)
    g_k, g_v = sparse_pairs(layout, views, state_indices, lam, dtype)

    k = torch.cat([g_k, x_k], dim=2)  # [B, Hg, E, d]
    v = torch.cat([g_v, x_v], dim=2)
    g_ok = torch.arange(lam, device=n.device) < layout.num_sparse(n - C)[:, None]
    ok = torch.cat([g_ok, x_ok], dim=1)[:, None].expand(-1, Hg, -1)  # [B, Hg, E]
    at = torch.cat(
        [views.positions[state_indices].long(), x_positions[:, None].expand(-1, Hg, -1)], dim=2
    )
    w = None
    if layout.has_score_weights:
        per_set = group.weights.importance.to(dtype).repeat_interleave(sets_per_kv_head, dim=0)[
            :, None
        ]
        x_w = pair_importance(x_k, x_v, per_set)
        w = torch.cat([views.score_weights[state_indices].to(dtype), x_w], dim=2)  # [B, Hg, E]

    empty = layout.num_folded(n - C) == 0
    keep = ok
    if bool((layout.num_evicted(n) > lam).any()):  # else every candidate fits, whatever its score
        maps = group.weights.maps_of(n)
        scores = recall_errors(k, v, maps, views.H, views.s, state_indices, empty)
        if w is not None:
            scores = scores * w
        recent = at >= (stop - layout.recent_size)[:, None, None]
        scores = scores.masked_fill(recent, torch.inf)
        keep = _largest(scores, at, ok, lam)
        if layout.feature_dim:
            _fold(group, k, v, ok & ~keep, state_indices, n, empty)
    _replace(group, new_k, new_v, at, w, keep, state_indices)


def _largest(scores: Tensor, positions: Tensor, ok: Tensor, count: int) -> Tensor:
    """Mask of so many valid candidates of largest score, ties to the older pair.

    A score that is NaN counts as infinite.
    """
    scores = torch.where(ok, scores.masked_fill(scores.isnan(), torch.inf), -torch.inf)
    by_age = torch.where(ok, positions, torch.iinfo(torch.int64).max).argsort(-1)
    order = scores.gather(-1, by_age).argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(ok).scatter(-1, by_age.gather(-1, order[..., :count]), True)
    return keep & ok


def _fold(
    group: HeadGroup,
    k: Tensor,
    v: Tensor,
    folded: Tensor,
    state_indices: Tensor,
    n: Tensor,
    empty: Tensor,
) -> None:
    """H += sum phi(k) v^T and s += sum phi(k) over the folded candidates, at most C per set."""
    layout, views = group.layout, group.views
    dtype = compute_dtype(k)
    room = layout.update_interval
    chosen = folded.int().argsort(dim=-1, descending=True, stable=True)[..., :room]
    mask = folded.gather(-1, chosen).unsqueeze(-1)
    index = chosen.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
    states_per_set = layout.num_state_heads // layout.num_sparse_heads
    k = k.gather(2, index).to(dtype).repeat_interleave(states_per_set, dim=1)
    v = v.gather(2, index).to(dtype).masked_fill(~mask, 0)
    v = v.repeat_interleave(states_per_set, dim=1)
    phi = feature_map(k, group.weights.maps_of(n).to(dtype))
    phi = phi.masked_fill(~mask.repeat_interleave(states_per_set, dim=1), 0)
    H, s = _gather_state(views.H, views.s, state_indices, empty, dtype)
    place = dither(n // layout.update_interval, H.shape[2])[:, None]  # [B, 1, 2F]
    views.H[state_indices] = add_dithered(H, phi.mT @ v, place.unsqueeze(-1))
    views.s[state_indices] = add_dithered(s, phi.sum(2), place)


def _replace(
    group: HeadGroup,
    k: Tensor | Int8Rows,
    v: Tensor | Int8Rows,
    at: Tensor,
    w: Tensor | None,
    keep: Tensor,
    state_indices: Tensor,
) -> None:
    """Write the kept incoming pairs into the free entries and those of the folded pairs, in order.

    Args:
        k, v: `[B, Hg, C, d]`, of the incoming pairs alone, as the page keeps them.
        at, w, keep: of all candidates.
    """
    views, lam = group.views, group.layout.sparse_cache_size
    new = keep[..., lam:]
    room = min(lam, new.shape[-1])
    free = keep[..., :lam].int().argsort(dim=-1, stable=True)[..., :room]
    winner = new.int().argsort(dim=-1, descending=True, stable=True)[..., :room]
    b, g, i = new.gather(-1, winner).nonzero(as_tuple=True)
    target, evicted = free[b, g, i], winner[b, g, i]
    source = evicted + lam
    for rows, to, scales in (
        (k, views.sparse_k, views.sparse_k_scale),
        (v, views.sparse_v, views.sparse_v_scale),
    ):
        if isinstance(rows, Int8Rows):
            scales[state_indices[b], g, target] = rows.scale[b, g, evicted]
            to[state_indices[b], g, target] = rows.numbers[b, g, evicted]
        else:
            to[state_indices[b], g, target] = rows[b, g, evicted]
    views.positions[state_indices[b], g, target] = at[b, g, source].int()
    if w is not None:
        views.score_weights[state_indices[b], g, target] = w[b, g, source].to(
            views.score_weights.dtype
        )
