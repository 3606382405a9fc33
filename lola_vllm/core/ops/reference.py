"""LoLA attention for one sequence in plain torch: the truth that every kernel is tested against.

Follows arXiv 2505.23666 (LoLA) over arXiv 2410.10254 (LoLCATs); `docs/algorithm.md` says where the
two disagree with their code and what is decided. Written for reading: Python lists hold the
positions of each memory, and nothing is approximated or skipped.

Symbols: T tokens; Hq query heads, Hkv KV heads (`num_kv_heads`), Hs state heads (the heads of
`feature_map_k`), Hg sparse sets (Hs, or Hkv when shared); d `head_dim`; F `feature_dim`; eta
`window_size`; lam `sparse_cache_size`; C `update_interval`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops.constants import FEATURE_FLOOR, MAX_LOG_IMPORTANCE, RECALL_EPS
from lola_vllm.core.ops.int8 import rounded
from lola_vllm.core.ops.key_rotation import KeyRotation


@dataclass
class LolaState:
    """What a layer remembers of a sequence of n tokens.

    Attributes:
        H: `[Hs, 2F, d]`, the sum of phi(k) v^T over the pairs in the hidden state.
        s: `[Hs, 2F]`, the sum of phi(k) over the same pairs.
        k, v: `[Hs, T, d]`, keys and values; those of exact pairs are as the page holds them.
        w: `[Hg, T]`, what multiplies the scores of pairs that have left the window.
        sparse_positions: per state head, the sorted positions in its sparse cache.
        window_positions: sorted positions in the window, the pinned sinks included.
    """

    H: Tensor
    s: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    sparse_positions: list[list[int]]
    window_positions: list[int]


def feature_map(x: Tensor, weight: Tensor) -> Tensor:
    """phi(x) = clamp(concat(softmax(xW), softmax(-xW)), min=1e-12), LoLCATs section 3.

    Args:
        x: `[..., d]`, queries or keys after RoPE.
        weight: `[d, F]`, or anything that broadcasts with `x` in a matrix product.

    Returns:
        `[..., 2F]`; each row sums to 2.
    """
    y = x @ weight
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1).clamp(min=FEATURE_FLOOR)


def self_recall_error(phi_k: Tensor, v: Tensor, H: Tensor, s: Tensor) -> Tensor:
    """SRE = || v - phi(k)^T H / (phi(k)^T s + 1e-6) ||_2, the paper's section 3.2.

    Args:
        phi_k: `[E, 2F]`. v: `[E, d]`. H: `[2F, d]`. s: `[2F]`.

    Returns:
        `[E]`; with an empty state the prediction is 0 and the error is ||v||.
    """
    predicted = (phi_k @ H) / ((phi_k @ s) + RECALL_EPS).unsqueeze(-1)
    return (v - predicted).norm(dim=-1)


def pair_importance(k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """w = exp(clamp(a . rho(k) + b . v + c, -20, 20)), what multiplies a pair's score.

    rho(k) are the lengths of the key's rotary pairs, sqrt(k_i^2 + k_(i + d // 2)^2). RoPE does not
    change them, so w does not depend on the pair's position.

    Args:
        k, v: `[..., d]`; float32 or float64.
        weights: `[..., d // 2 + d + 1]`: a, b and c; broadcasts with k and v.

    Returns:
        `[...]`, in (0, 5e8); NaN where k or v is.
    """
    half, d = k.shape[-1] // 2, k.shape[-1]
    a, b, c = weights.split([half, d, 1], dim=-1)
    rho = torch.hypot(k[..., :half], k[..., half : 2 * half])
    log = (a * rho).sum(-1) + (b * v).sum(-1) + c.squeeze(-1)
    return log.clamp(-MAX_LOG_IMPORTANCE, MAX_LOG_IMPORTANCE).exp()


def mix(
    logits: Tensor,
    v: Tensor,
    phi_q: Tensor,
    H: Tensor,
    s: Tensor,
    factor: Tensor,
    mixing: str,
    sink_logit: Tensor | None = None,
) -> Tensor:
    """One query's output: softmax over the exact pairs mixed with the linear read-out.

    The safe form of a common denominator: no exponential is taken of anything but a difference.

    Args:
        logits: `[S]`, q.k / sqrt(d) of the exact pairs (window, sinks, sparse cache), S >= 1.
        v: `[S, d]`. phi_q: `[2F]`. H: `[2F, d]`. s: `[2F]`.
        factor: scalar before the sigmoid, g = sigmoid(factor).
        mixing: "lola" or "lolcats".
        sink_logit: scalar, of a learned sink: a pair more in the denominator, whose value is 0.

    Returns:
        `[d]`.
    """
    lse = logits.logsumexp(0)
    if sink_logit is not None:
        lse = torch.logaddexp(lse, sink_logit)
    y_soft = (logits - lse).exp() @ v
    D = phi_q @ s
    if D == 0:  # nothing was folded in yet
        return y_soft
    log_g = torch.nn.functional.logsigmoid(factor)
    if mixing == "lolcats":
        lse, log_not_g = lse - logits.max(), torch.zeros_like(factor)
    else:
        log_not_g = torch.nn.functional.logsigmoid(-factor)
    r = torch.sigmoid(lse + log_g - D.log() - log_not_g)
    return r * y_soft + (1 - r) * (phi_q @ H) / D


def lola_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map_q: Tensor,
    feature_map_k: Tensor,
    window_factors: Tensor,
    config: LolaConfig,
    importance: Tensor | None = None,
    rotation: KeyRotation | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, LolaState]:
    """LoLA attention over a whole sequence, causal, from an empty state.

    Args:
        q: `[T, Hq, d]`, after RoPE; float32 or float64 (narrower inputs are computed in float32).
        k, v: `[T, Hkv, d]`, k after RoPE. With `rotation`, RoPE was of each token's
            RoPE position in the shifted context.
        feature_map_q: `[Hq, d, F]`. feature_map_k: `[Hs, d, F]`.
        window_factors: `[Hq]`, before the sigmoid.
        config: the algorithm's parameters, of one layer.
        importance: `[Hkv, d // 2 + d + 1]`, weights of `pair_importance`; None: scores are not
            weighted.
        rotation: of keys, by a context shift, `[d / 2]` angles or fewer; None: none comes.
        sink_logits: `[Hq]`, of learned sinks (gpt-oss); None: there are none.

    Returns:
        out `[T, Hq, d]` in q's dtype, and the state after the T tokens.

    Raises:
        LolaConfigError: head counts that do not divide each other.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out_dtype = q.dtype
    q, k, v, feature_map_q, feature_map_k, window_factors = (
        x.to(dtype) for x in (q, k, v, feature_map_q, feature_map_k, window_factors)
    )
    T, Hq, d = q.shape
    Hkv, Hs = k.shape[1], feature_map_k.shape[0]
    config.check_heads(Hq, Hkv, Hs)
    Hg = config.num_sparse_heads(Hs, Hkv)
    eta, C, of_sets = config.window_size, config.update_interval, config.of_sets(Hg)

    k_s = k.repeat_interleave(Hs // Hkv, dim=1).transpose(0, 1).clone()  # [Hs, T, d]
    v_s = v.repeat_interleave(Hs // Hkv, dim=1).transpose(0, 1).clone()
    w = torch.ones(Hg, T, dtype=dtype, device=q.device)
    if importance is not None:
        importance = importance.to(dtype).repeat_interleave(Hg // Hkv, dim=0)
    int8 = config.sparse_dtype == "int8"
    phi_k = feature_map(k_s, feature_map_k)  # [Hs, T, 2F]
    phi_q = feature_map(q.transpose(0, 1), feature_map_q)  # [Hq, T, 2F]

    H = torch.zeros(Hs, phi_k.shape[-1], d, dtype=dtype, device=q.device)
    s = torch.zeros(Hs, phi_k.shape[-1], dtype=dtype, device=q.device)
    sinks: list[int] = []
    window: list[int] = []
    sparse: list[list[int]] = [[] for _ in range(Hg)]
    out = torch.empty(T, Hq, d, dtype=dtype, device=q.device)

    for t in range(T):
        if rotation is not None and rotation.schedule.due(t):
            back, forward = _outside_bucket(t, config, rotation)
            k_s[:, back] = rotation.rotate_back(k_s[:, back])
            k_s[:, forward] = rotation.rotate_forward(k_s[:, forward])
            if int8:
                left = [p for p in back + forward if p not in window]
                k_s[:, left] = rounded(k_s[:, left])
            phi_k[:, :t] = feature_map(rotation.rotate_for_fold(k_s[:, :t]), feature_map_k)
            H, s = H * rotation.schedule.decay, s * rotation.schedule.decay
            old = torch.tensor([p for p in range(t) if p not in window], device=q.device)
            w[:, old] *= rotation.schedule.score_decay_factors(
                old, torch.tensor(t, device=q.device)
            ).to(dtype)
        (sinks if t < config.sink_size else window).append(t)
        for h in range(Hq):
            state_head, sparse_head = h // (Hq // Hs), h // (Hq // Hg)
            exact = sinks + sparse[sparse_head] + window
            logits = k_s[state_head, exact] @ q[t, h] / d**0.5
            out[t, h] = mix(
                logits,
                v_s[state_head, exact],
                phi_q[h, t],
                H[state_head],
                s[state_head],
                window_factors[h],
                config.mixing,
                None if sink_logits is None else sink_logits[h].to(dtype),
            )
        if (t + 1) % C == 0:
            window, evicted = _evict(window, t + 1 - eta)
            if int8:
                for x in (k_s, v_s):
                    x[:, evicted] = rounded(x[:, evicted])
            taken = k_s[:, evicted]
            if rotation is not None and t >= rotation.schedule.length:
                taken = rotation.rotate_for_fold(taken)
            phi_k[:, evicted] = feature_map(taken, feature_map_k)
            if importance is not None:
                sets = slice(None, None, Hs // Hg)  # a state head of each
                pairs = k_s[sets, evicted], v_s[sets, evicted]
                w[:, evicted] = pair_importance(*pairs, importance[:, None])
            for sparse_head in range(Hg):
                heads = list(range(sparse_head * (Hs // Hg), (sparse_head + 1) * (Hs // Hg)))
                candidates = sparse[sparse_head] + evicted
                scores = _scores(phi_k, v_s, H, s, heads, candidates)
                scores = scores * w[sparse_head, candidates]
                first_recent = t + 1 - eta - of_sets[sparse_head].recent_pairs
                newest = torch.tensor(candidates, dtype=torch.int64) >= first_recent
                scores = scores.masked_fill(newest.to(scores.device), torch.inf)
                kept, folded = _select(candidates, scores, of_sets[sparse_head].sparse_pairs)
                sparse[sparse_head] = kept
                if not of_sets[sparse_head].hidden_state:
                    continue  # the head forgets the others
                for h in heads:
                    H[h] += phi_k[h, folded].T @ v_s[h, folded]
                    s[h] += phi_k[h, folded].sum(0)

    per_state_head = [list(sparse[h // (Hs // Hg)]) for h in range(Hs)]
    return out.to(out_dtype), LolaState(H, s, k_s, v_s, w, per_state_head, sinks + window)


def _outside_bucket(
    n: int, config: LolaConfig, rotation: KeyRotation
) -> tuple[list[int], list[int]]:
    """Positions whose keys a context shift after n tokens rotates: back and forward. Sinks stay."""
    start, end = (
        rotation.schedule.bucket_start,
        rotation.schedule.bucket_start + rotation.schedule.interval,
    )
    shifted, positions = n - rotation.schedule.length, range(config.sink_size, n)
    return [p for p in positions if p - shifted >= end], [
        p for p in positions if p + shifted < start
    ]


def _evict(window: list[int], start: int) -> tuple[list[int], list[int]]:
    """Split the window at position `start`: (positions that stay, positions evicted)."""
    return [p for p in window if p >= start], [p for p in window if p < start]


def _scores(
    phi_k: Tensor, v: Tensor, H: Tensor, s: Tensor, heads: list[int], candidates: list[int]
) -> Tensor:
    """Selection score per candidate `[E]`: SRE, or the mean of SRE / ||v|| over several heads."""
    errors = torch.stack(
        [self_recall_error(phi_k[h, candidates], v[h, candidates], H[h], s[h]) for h in heads]
    )
    if len(heads) == 1:
        return errors[0]
    norms = torch.stack([v[h, candidates].norm(dim=-1) for h in heads])
    return (errors / norms.clamp(min=RECALL_EPS)).mean(0)


def _select(
    candidates: list[int], scores: Tensor, sparse_cache_size: int
) -> tuple[list[int], list[int]]:
    """Candidates of largest score for the cache, and the rest; both sorted. Ties keep the older.

    A score that is NaN counts as infinite.
    """
    scores = scores.masked_fill(scores.isnan(), torch.inf)
    order = scores.argsort(descending=True, stable=True).tolist()
    kept = sorted(candidates[i] for i in order[:sparse_cache_size])
    folded = sorted(candidates[i] for i in order[sparse_cache_size:])
    return kept, folded
