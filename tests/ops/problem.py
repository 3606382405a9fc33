"""Random LoLA problems, page pools poisoned with NaN, and drivers for a back end's ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lola_vllm.config import LolaConfig
from lola_vllm.ops.contract import LolaWeights
from lola_vllm.ops.reference import LolaState, feature_map, lola_attention
from lola_vllm.state import StateLayout, StateViews


@dataclass
class Problem:
    """One layer's inputs for one sequence, and its weights."""

    q: Tensor
    k: Tensor
    v: Tensor
    feature_map_q: Tensor
    feature_map_k: Tensor
    window_factors: Tensor
    config: LolaConfig

    def reference(self) -> tuple[Tensor, LolaState]:
        """The truth, in float64 (from float32 or bfloat16 inputs too)."""
        tensors = (self.q, self.k, self.v, self.feature_map_q, self.feature_map_k)
        doubles = [t.double() for t in (*tensors, self.window_factors)]
        return lola_attention(*doubles, self.config)

    def weights(self) -> LolaWeights:
        return LolaWeights.prepare(
            self.feature_map_q, self.feature_map_k, self.window_factors, self.config.mixing
        )

    def layout(self) -> StateLayout:
        return StateLayout.from_config(
            self.config,
            num_kv_heads=self.k.shape[1],
            num_state_heads=self.feature_map_k.shape[0],
            head_dim=self.q.shape[-1],
            kv_dtype=self.k.dtype,
            state_dtype=torch.float64 if self.q.dtype == torch.float64 else None,
        )


def make_problem(
    T: int,
    config: LolaConfig,
    *,
    Hkv: int = 2,
    group: int = 3,
    Hs: int | None = None,
    d: int = 16,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    scale: float = 1.0,
) -> Problem:
    """A random problem; `scale` multiplies q and k, so logits grow with its square."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    Hq, F = Hkv * group, config.feature_dim
    tensors = [
        randn(T, Hq, d) * scale,
        randn(T, Hkv, d) * scale,
        randn(T, Hkv, d),
        randn(Hq, d, F) * 0.5,
        randn(Hs or Hkv, d, F) * 0.5,
    ]
    factors = (randn(Hq) - 1).to(torch.promote_types(dtype, torch.float32))
    return Problem(*(t.to(dtype) for t in tensors), factors, config)


def unrecallable(interval: int, sharing: str, dtype: torch.dtype) -> Problem:
    """Four pairs of KV head 0 whose scores are NaN or infinite, for a cache of three.

    Whatever the interval, the oldest three are what stays of that head: 7, 9 and 14.
    """
    config = LolaConfig(
        window_size=4, sparse_cache_size=3, update_interval=interval, feature_dim=8,
        sparse_sharing=sharing,
    )  # fmt: skip
    problem = make_problem(40, config, Hs=6, dtype=dtype)
    problem.v[[7, 14, 16], 0] = torch.nan
    problem.v[9, 0] = torch.inf
    return problem


def poisoned_pool(
    layout: StateLayout, num_pages: int, extra_stride: int = 0
) -> tuple[Tensor, StateViews]:
    """Pages whose every float is NaN; `extra_stride` widens the page stride beyond the page."""
    pages = torch.full((num_pages, layout.page_bytes + extra_stride), 0xFF, dtype=torch.uint8)
    return pages, layout.views(pages)


def assert_state_matches(
    problem: Problem, layout: StateLayout, views: StateViews, slot: int, n: int, **tolerance: float
) -> None:
    """The page holds the reference's state: positions, pairs, H and s, and the sum identity."""
    _, state = problem.reference()
    n_t = torch.tensor(n)
    num_sparse, num_folded = int(layout.num_sparse(n_t)), int(layout.num_folded(n_t))
    share = layout.num_state_heads // layout.num_sparse_heads
    Hkv, Hg = layout.num_kv_heads, layout.num_sparse_heads
    for g in range(Hg):
        positions = views.positions[slot, g, :num_sparse].long()
        assert sorted(positions.tolist()) == state.sparse_positions[g * share]
        kv = g // (Hg // Hkv)
        assert torch.equal(views.sparse_k[slot, g, :num_sparse], problem.k[positions, kv])
        assert torch.equal(views.sparse_v[slot, g, :num_sparse], problem.v[positions, kv])
    window = torch.tensor(state.window_positions, dtype=torch.long)
    start = int(layout.window_start(n_t))
    assert window.tolist() == [*range(min(n, layout.sink_size)), *range(start, n)]
    if len(window):
        rows = layout.row(window)
        assert torch.equal(views.exact_k[slot, :, rows].transpose(0, 1), problem.k[window])
        assert torch.equal(views.exact_v[slot, :, rows].transpose(0, 1), problem.v[window])
    assert len(window) + num_sparse + num_folded == n
    torch.testing.assert_close(
        state.s.sum(-1), torch.full_like(state.s.sum(-1), 2.0 * num_folded), rtol=1e-9, atol=1e-9
    )
    if num_folded:
        torch.testing.assert_close(views.H[slot].double(), state.H, **tolerance)
        torch.testing.assert_close(views.s[slot].double(), state.s, **tolerance)


def assert_unrecallable_stay(
    problem: Problem, layout: StateLayout, views: StateViews, slot: int
) -> None:
    """The page of an `unrecallable` problem holds the same sparse pairs as the reference."""
    _, state = problem.reference()
    share = layout.num_state_heads // layout.num_sparse_heads
    positions = [sorted(row) for row in views.positions[slot].tolist()]
    assert positions == state.sparse_positions[::share]
    assert positions[0] == [7, 9, 14]


def assert_bounds_hold(problem: Problem, layout: StateLayout, views: StateViews, slot: int) -> None:
    """What a page of interval 1 keeps of each sparse pair bounds its recall error, and closely.

    After a few hundred folded pairs: most errors must not have been computed at the last update.
    """
    Hs, lam = layout.num_state_heads, layout.sparse_cache_size
    share = Hs // layout.num_sparse_heads
    assert layout.parts["bounds"][0] == (Hs, 6, lam)
    k, v = (
        x[slot].double().repeat_interleave(share, dim=0) for x in (views.sparse_k, views.sparse_v)
    )
    phi = feature_map(k, problem.feature_map_k.double())
    H, s = views.H[slot].double(), views.s[slot].double().unsqueeze(-1)
    p = phi @ H / (phi @ s)
    now = (v - p).norm(dim=-1)
    low, z, value, length, along, scale = views.bounds[slot].double().unbind(1)
    u = views.directions[slot].double() * scale.unsqueeze(-1)
    torch.testing.assert_close(u.norm(dim=-1), torch.ones_like(scale), rtol=1e-5, atol=0)
    torch.testing.assert_close((u * v).sum(-1), along, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(value, v.norm(dim=-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(length, phi.norm(dim=-1), rtol=1e-4, atol=1e-4)
    total = (phi @ s).squeeze(-1)
    assert (z <= total * 1.0001).all()
    assert (z < total * 0.99999).float().mean() > 0.5  # most are not of the last update
    assert (low < now).all()
    assert (low <= (u * (v - p)).sum(-1)).all()  # what it bounds, which is less than the error
    assert (low > 0.5 * now).float().mean() > 0.9  # and closely


def full_attention(problem: Problem) -> Tensor:
    """Plain causal softmax attention, `[T, Hq, d]`."""
    q, k, v = (x.double().transpose(0, 1) for x in (problem.q, problem.k, problem.v))
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    ).transpose(0, 1)
