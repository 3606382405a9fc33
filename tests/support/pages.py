"""What a page must hold, asked of its bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from lola_vllm.core.ops.contract import LayerState
from lola_vllm.core.ops.int8 import Int8Rows
from lola_vllm.core.ops.reference import LolaState
from lola_vllm.core.state import StateViews
from tests.support.problem import STATE_INDEX, Problem

# How close keys of the reference are that context shifts have rotated.
ROTATED = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-6, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def assert_state_matches(
    problem: Problem,
    state: LayerState,
    n: int | None = None,
    state_index: int = STATE_INDEX,
    expected: LolaState | None = None,
    **tolerance: float,
) -> None:
    """The page holds the reference's state: positions, pairs, H and s, and the sum identity.

    Args:
        n: tokens that the page has seen; None: all of the problem's, as the reference has.
        expected: the reference's state, where it is known already.
    """

    def assert_keys(held: Tensor, exact: Tensor) -> None:
        if problem.rotation is None:
            assert torch.equal(held, exact.to(held.dtype))
        else:  # rounded at each context shift
            torch.testing.assert_close(held.double(), exact, **ROTATED[problem.k.dtype])

    n = len(problem.q) if n is None else n
    expected = expected or problem.reference()[1]
    layout, views, n_t = state.groups[0].layout, state.groups[0].views, torch.tensor(n)
    num_sparse, num_folded = int(layout.num_sparse(n_t)), int(layout.num_folded(n_t))
    share = layout.num_state_heads // layout.num_sparse_heads
    Hkv, Hg = layout.num_kv_heads, layout.num_sparse_heads
    for g in range(Hg):
        positions = views.positions[state_index, g, :num_sparse].long()
        assert sorted(positions.tolist()) == expected.sparse_positions[g * share]
        kv = g // (Hg // Hkv)
        held, exact = (
            [x[state_index, g, :num_sparse] for x in (views.sparse_k, views.sparse_v)],
            [x[g * share, positions] for x in (expected.k, expected.v)],
        )
        if layout.int8_pairs:
            assert_int8(
                problem, [x[state_index, g, :num_sparse] for x in scales(views)], held, exact
            )
        else:
            assert_keys(held[0], exact[0])
            assert torch.equal(held[1], problem.v[positions, kv])
        if layout.has_score_weights:
            torch.testing.assert_close(
                views.score_weights[state_index, g, :num_sparse].double(),
                expected.w[g, positions].double(),
                rtol=1e-9 if problem.q.dtype == torch.float64 else 1e-4,
                atol=0,
            )
    window = torch.tensor(expected.window_positions, dtype=torch.long)
    start = int(layout.window_start(n_t))
    assert window.tolist() == [*range(min(n, layout.sink_size)), *range(start, n)]
    if len(window):
        rows = layout.row(window)
        first = torch.arange(Hkv) * (layout.num_state_heads // Hkv)  # a state head of each
        assert_keys(views.exact_k[state_index, :, rows], expected.k[first][:, window])
        assert torch.equal(views.exact_v[state_index, :, rows].transpose(0, 1), problem.v[window])
    assert len(window) + num_sparse + num_folded == n
    if problem.rotation is None:
        total = expected.s.sum(-1)
        folded = torch.full_like(total, 2.0 * num_folded)
        torch.testing.assert_close(total, folded, rtol=1e-9, atol=1e-9)
    if num_folded:
        torch.testing.assert_close(views.H[state_index].double(), expected.H, **tolerance)
        torch.testing.assert_close(views.s[state_index].double(), expected.s, **tolerance)


def scales(views: StateViews) -> tuple[Tensor, Tensor]:
    """What multiplies the numbers of int8 keys and values, `[N, Hg, lam]`."""
    return views.sparse_k_scale, views.sparse_v_scale


def assert_int8(
    problem: Problem, scale: list[Tensor], numbers: list[Tensor], exact: list[Tensor]
) -> None:
    """int8 keys and values `[n, d]` are the reference's to the last bit.

    A key that a context shift rotated may be rounded to the next number where the rotation is in
    another dtype.
    """
    for name, s, x, expected in zip("kv", scale, numbers, exact, strict=True):
        found = Int8Rows(x, s).to(torch.float64)
        close = {"rtol": 1e-6, "atol": 1e-9}
        if name == "k" and problem.rotation is not None and problem.k.dtype != torch.float64:
            close = {"rtol": 1e-2, "atol": 1.01 * float(s.max()) if len(s) else 0.0}
        torch.testing.assert_close(found, expected, equal_nan=True, **close)


def assert_unrecallable_stay(problem: Problem, state: LayerState) -> None:
    """The page of an `unrecallable` problem holds the same sparse pairs as the reference."""
    layout = state.groups[0].layout
    share = layout.num_state_heads // layout.num_sparse_heads
    positions = [sorted(row) for row in state.groups[0].views.positions[STATE_INDEX].tolist()]
    assert positions == problem.reference()[1].sparse_positions[::share]
    assert positions[0] == [7, 9, 14]
