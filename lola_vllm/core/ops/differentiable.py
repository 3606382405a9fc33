"""LoLA attention over whole sequences with gradients: what training and plain Hugging Face use.

The same function as `reference.py` and the serving ops, in a form without a loop over queries.
Which pairs are cached and which are folded is decided first, update by update, without gradients
(a choice has none); everything after that is one batch of matrix products over all chunks.

Symbols: B rows; T tokens; Hq query heads, Hkv KV heads, Hs state heads, Hg sparse sets; d
`head_dim`; F `feature_dim`; eta `window_size`; lam `sparse_cache_size`; C `update_interval`;
U = ceil(T / C) chunks. Chunk u holds the queries of positions uC to uC + C - 1, which see the
memory after u updates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops.constants import RECALL_EPS
from lola_vllm.core.ops.exact_attention import exact_attention
from lola_vllm.core.ops.int8 import rounded
from lola_vllm.core.ops.reference import feature_map, pair_importance


class MemoryPlan(NamedTuple):
    """Where every pair is, chunk by chunk; positions, -1 where there is none.

    Attributes:
        sparse: `[B, Hg, U, min(lam, T)]` int64, the sparse cache that chunk u sees.
        folded: `[B, Hg, U, C]` int64, what entered the hidden state in the update before chunk u.
    """

    sparse: Tensor
    folded: Tensor


@torch.no_grad()
def plan_memory(
    phi_k: Tensor,
    v: Tensor,
    config: LolaConfig,
    num_sparse_heads: int,
    importance: Tensor | None = None,
) -> MemoryPlan:
    """Decide by self-recall error what is cached and what is folded (paper section 3.3).

    Args:
        phi_k: `[B, Hs, T, 2F]`, features of the keys; float32 or float64.
        v: `[B, Hs, T, d]`, the same dtype.
        config: window, sparse cache, interval and sinks are read.
        num_sparse_heads: Hg, which divides Hs.
        importance: `[B, Hg, T]`, what multiplies each pair's score; None: nothing does.

    Returns:
        The plan for all chunks. The update after the last chunk is left out: nobody sees it.
    """
    B, Hs, T, _ = phi_k.shape
    eta, C = config.window_size, config.update_interval
    lam = min(config.sparse_pairs, T)
    Hg = num_sparse_heads
    U = -(-T // C)
    device = phi_k.device
    sparse = torch.full((B, Hg, U, lam), -1, dtype=torch.int64, device=device)
    folded = torch.full((B, Hg, U, C), -1, dtype=torch.int64, device=device)
    H = phi_k.new_zeros(B, Hs, phi_k.shape[-1], v.shape[-1])
    s = phi_k.new_zeros(B, Hs, phi_k.shape[-1])
    cache = torch.empty(B, Hg, 0, dtype=torch.int64, device=device)
    start = config.sink_size  # of the window: everything before it has been evicted
    for u in range(1, U):
        stop = max(start, u * C - eta)
        evicted = torch.arange(start, stop, device=device).expand(B, Hg, -1)
        candidates = torch.cat([cache, evicted], dim=-1)  # by position, as the cache is sorted
        start = stop
        if candidates.shape[-1] <= lam:
            cache = candidates
        else:
            out = candidates
            if lam:
                scores = _scores(phi_k, v, H, s, candidates)
                if importance is not None:
                    scores = scores * importance.gather(2, candidates)
                scores = scores.masked_fill(candidates >= stop - config.recent_pairs, torch.inf)
                order = scores.argsort(dim=-1, descending=True, stable=True)
                cache = candidates.gather(-1, order[..., :lam].sort(-1).values)
                out = candidates.gather(-1, order[..., lam:].sort(-1).values)
            folded[:, :, u, : out.shape[-1]] = out
            per_head = out.repeat_interleave(Hs // Hg, dim=1)
            phi_out = _take(phi_k, per_head)
            H += phi_out.mT @ _take(v, per_head)
            s += phi_out.sum(2)
        sparse[:, :, u, : cache.shape[-1]] = cache
    return MemoryPlan(sparse, folded)


def _scores(phi_k: Tensor, v: Tensor, H: Tensor, s: Tensor, candidates: Tensor) -> Tensor:
    """Selection scores `[B, Hg, E]`: SRE, or the mean of SRE / ||v|| over the heads of a set."""
    B, Hs = phi_k.shape[:2]
    Hg = candidates.shape[1]
    per_head = candidates.repeat_interleave(Hs // Hg, dim=1)
    phi, values = _take(phi_k, per_head), _take(v, per_head)
    predicted = (phi @ H) / ((phi @ s.unsqueeze(-1)) + RECALL_EPS)
    errors = (values - predicted).norm(dim=-1)
    if Hs == Hg:
        return errors
    relative = errors / values.norm(dim=-1).clamp(min=RECALL_EPS)
    return relative.view(B, Hg, Hs // Hg, -1).mean(2)


def _take(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of x `[B, H, T, n]` at `positions` `[B, H, E]`: `[B, H, E, n]`."""
    return x.gather(2, positions.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def _parts(x: Tensor, dim: int, count: int) -> tuple[Tensor, ...]:
    return x.split(x.shape[dim] // count, dim)


def lola_attention_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map_q: Tensor,
    feature_map_k: Tensor,
    window_factors: Tensor,
    config: LolaConfig,
    chunks: Tensor | None = None,
    importance: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """LoLA attention over whole sequences from empty states, with gradients to every tensor.

    Args:
        q: `[B, T, Hq, d]`, after RoPE. k, v: `[B, T, Hkv, d]`, k after RoPE. Sums are made in
            float32, or in float64 for float64 inputs.
        feature_map_q: `[Hq, d, F]`. feature_map_k: `[Hs, d, F]`. window_factors: `[Hq]`, before
            the sigmoid.
        config: the parameters of one layer.
        chunks: `[N]` int64, the chunks whose queries to answer; default: all.
        importance: `[Hkv, d // 2 + d + 1]`, weights of `pair_importance`; None: scores are not
            weighted. It decides a choice, so it gets no gradient.
        sink_logits: `[Hq]`, of learned sinks (gpt-oss); None: there are none.

    Returns:
        `[B, T, Hq, d]` in q's dtype; with `chunks`, `[B, N * C, Hq, d]` for the queries of those
        chunks one after another, of which those past T mean nothing.

    Raises:
        LolaConfigError: head counts that do not divide each other.
    """
    heads = config.for_heads()
    if len(heads) > 1:  # KV heads do not see each other
        count = len(heads)
        q_of, k_of, v_of = (_parts(x, 2, count) for x in (q, k, v))
        map_q_of, map_k_of, factors_of = (
            _parts(x, 0, count) for x in (feature_map_q, feature_map_k, window_factors)
        )
        weights_of = [None] * count if importance is None else importance.split(1)
        sinks_of = [None] * count if sink_logits is None else _parts(sink_logits, 0, count)
        answers = [
            lola_attention_parallel(
                q_of[i], k_of[i], v_of[i], map_q_of[i], map_k_of[i], factors_of[i], heads[i],
                chunks, weights_of[i], sinks_of[i],
            )
            for i in range(count)
        ]  # fmt: skip
        return torch.cat(answers, dim=2)
    if not config.hidden_state:  # without features H, s and the features' sums are empty
        feature_map_q, feature_map_k = feature_map_q[..., :0], feature_map_k[..., :0]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out_dtype = q.dtype
    B, T, Hq, d = q.shape
    Hkv, Hs = k.shape[2], feature_map_k.shape[0]
    config.check_heads(Hq, Hkv, Hs)
    Hg = config.num_sparse_heads(Hs, Hkv)
    C = config.update_interval
    U = -(-T // C)

    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # [B, H, T, d]
        map_q, map_k = feature_map_q.to(dtype), feature_map_k.to(dtype)
        factors = window_factors.to(dtype)
        left_k, left_v = keys, values  # of pairs that have left the window
        all_k, all_v, first_left = keys, values, 0
        if config.sparse_dtype == "int8":
            left_k, left_v = rounded(keys), rounded(values)
            all_k, all_v = torch.cat([keys, left_k], 2), torch.cat([values, left_v], 2)
            first_left = T
        phi_k = feature_map(left_k.repeat_interleave(Hs // Hkv, dim=1), map_k)  # [B, Hs, T, 2F]
        v_s = left_v.repeat_interleave(Hs // Hkv, dim=1)
        w = None
        if importance is not None:
            weights = importance.detach().to(dtype)[:, None]
            w = pair_importance(left_k.detach(), left_v.detach(), weights)
            w = w.repeat_interleave(Hg // Hkv, dim=1)
        plan = plan_memory(phi_k.detach(), v_s.detach(), config, Hg, w)
        H, s = _hidden_states(phi_k, v_s, plan.folded)  # [B, Hs, U, 2F, d], [B, Hs, U, 2F]
        wanted = torch.arange(U, device=q.device) if chunks is None else chunks
        N = len(wanted)
        positions = wanted[:, None] * C + torch.arange(C, device=q.device)  # [N, C]
        rows = queries[:, :, positions.clamp(max=T - 1)]  # [B, Hq, N, C, d]

        cached = plan.sparse[:, :, wanted]
        index = _exact_pairs(positions, cached, T, config)  # [B, Hg, N, S]
        in_order = index.clamp(min=0)
        in_order[..., min(config.sink_size, T) :][..., : cached.shape[-1]] += first_left
        exact = exact_attention(_per_head(rows, Hg), all_k, all_v, positions, index, in_order)
        y = _per_query_head(exact.y, Hq)
        lse, largest = (
            _per_query_head(x.unsqueeze(-1), Hq).squeeze(-1) for x in (exact.lse, exact.largest)
        )  # [B, Hq, N, C]
        if sink_logits is not None:
            of_pairs = lse
            lse = torch.logaddexp(lse, sink_logits.to(dtype)[:, None, None])
            y = y * (of_pairs - lse).exp().unsqueeze(-1)

        phi_q = feature_map(rows, map_q[:, None])  # [B, Hq, N, C, 2F]
        by_state = _per_head(phi_q, Hs)
        D = by_state @ s[:, :, wanted].unsqueeze(-1)
        D = _per_query_head(D, Hq).squeeze(-1)  # [B, Hq, N, C]
        empty = D == 0  # exactly so before the first fold, as a feature is never 0
        safe = D.masked_fill(empty, 1)
        y_lin = _per_query_head(by_state @ H[:, :, wanted], Hq) / safe.unsqueeze(-1)
        log_gate = torch.nn.functional.logsigmoid(factors)
        if config.mixing == "lolcats":
            lse = lse - largest
        else:
            log_gate = log_gate - torch.nn.functional.logsigmoid(-factors)
        r = torch.sigmoid(lse + log_gate[:, None, None] - safe.log()).masked_fill(empty, 1)
        y = r.unsqueeze(-1) * y + (1 - r).unsqueeze(-1) * y_lin
        y = y.reshape(B, Hq, N * C, d).transpose(1, 2)
    if chunks is None:
        y = y[:, :T]
    return y.to(out_dtype)


def _hidden_states(phi_k: Tensor, v: Tensor, folded: Tensor) -> tuple[Tensor, Tensor]:
    """H and s as every chunk sees them: running sums over the updates' folds."""
    B, Hs, _, F2 = phi_k.shape
    Hg, U, C = folded.shape[1:]
    index = folded.repeat_interleave(Hs // Hg, dim=1).view(B, Hs, U * C)
    phi = _take(phi_k, index.clamp(min=0)).masked_fill((index < 0).unsqueeze(-1), 0)
    phi = phi.view(B, Hs, U, C, F2)
    values = _take(v, index.clamp(min=0)).view(B, Hs, U, C, -1)
    return (phi.mT @ values).cumsum(2), phi.sum(3).cumsum(2)


def _exact_pairs(positions: Tensor, cached: Tensor, T: int, config: LolaConfig) -> Tensor:
    """Positions `[B, Hg, N, S]` of sinks, sparse cache and window; -1 where there is none.

    Args:
        positions: `[N, C]`, of the queries. cached: `[B, Hg, N, lam]`, of the sparse cache.
    """
    device = positions.device
    eta, C = config.window_size, config.update_interval
    shape = (*cached.shape[:3], -1)
    sinks = torch.arange(min(config.sink_size, T), device=device)
    window = positions[:, :1] - eta + torch.arange(eta + C, device=device)  # [N, eta + C]
    window = window.masked_fill((window < config.sink_size) | (window >= T), -1)
    return torch.cat([sinks.expand(shape), cached, window.expand(shape)], dim=-1)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Query heads `[B, Hq, N, C, n]` under the heads they read: `[B, heads, N, Hq/heads C, n]`."""
    B, Hq, N, C, n = x.shape
    x = x.view(B, heads, Hq // heads, N, C, n).transpose(2, 3)
    return x.reshape(B, heads, N, Hq // heads * C, n)


def _per_query_head(x: Tensor, Hq: int) -> Tensor:
    """The inverse of `_per_head`: `[B, heads, N, Hq/heads C, n]` as `[B, Hq, N, C, n]`."""
    B, heads, N, rows, n = x.shape
    x = x.view(B, heads, N, Hq // heads, rows * heads // Hq, n).transpose(2, 3)
    return x.reshape(B, Hq, N, -1, n)
