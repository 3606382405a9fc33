"""Places of positions, and what a rebase does to keys: always RoPE of their places (Lemma 5)."""

import pytest
import torch

from lola_vllm.config import LolaConfig
from lola_vllm.ops import portable
from lola_vllm.ops.places import Places, Turn
from tests.support.problem import SLOT, decode, feed, make_problem


def places_after(n, P, D, sink, start=0):
    """What algorithm.md says of all positions before the n-th token is processed, step by step."""
    found = []
    for length in range(n):
        if length >= P and (length - P) % D == 0:
            found = [
                place if p < sink else place - D * (place >= start + D) + D * (place < start)
                for p, place in enumerate(found)
            ]
        found.append(length if length < P else P - D + (length - P) % D)
    return found


@pytest.mark.parametrize(("P", "D"), [(8, 4), (8, 1), (32, 8), (30, 5), (12, 6)])
def test_new_tokens_are_placed_below_the_trained_length(P, D):
    places = Places(P, D)
    found = places.place(torch.arange(5 * P)).tolist()
    assert found[:P] == list(range(P))
    assert all(P - D <= place < P for place in found[P:])
    assert found == [places_after(p + 1, P, D, 0)[p] for p in range(5 * P)]
    assert places.place(torch.tensor([2**31 - 1], dtype=torch.int64)) == P - D + (2**31 - 1 - P) % D
    due = [n for n in range(5 * P) if places.due(n)]
    assert due == list(range(P, 5 * P, D))
    assert places.due(torch.arange(5 * P)).nonzero().squeeze(1).tolist() == due


@pytest.mark.parametrize(
    ("P", "D", "start"), [(32, 8, 0), (32, 8, 8), (32, 8, 16), (32, 16, 0), (30, 5, 0), (30, 5, 7)]
)
@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("window", [6, 40])  # 40: longer than what is trained
def test_exact_keys_are_rope_of_their_places(P, D, start, sink, window):
    """After every number of tokens; and no key is placed after the newest."""
    config = LolaConfig(
        window_size=window, sparse_cache_size=9, update_interval=4, feature_dim=8, sink_size=sink
    )
    places = Places(P, D, far_zone_start=start)
    problem = make_problem(3 * P, config, places=places)
    raw = problem.k.clone()
    angles = 10.0 ** -torch.arange(8).double()

    def rope(k, place):
        cos, sin = (place[:, None, None] * angles).cos(), (place[:, None, None] * angles).sin()
        one, two = k.chunk(2, -1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    for x in (problem.q, problem.k):
        x.copy_(rope(x, places.place(torch.arange(3 * P))))
    state = problem.state()
    layout, views = state.layout, state.views
    for n in range(1, 3 * P + 1):
        decode(portable, problem, state, n - 1)
        now = torch.tensor(places_after(n, P, D, sink, start))
        assert places.exact(torch.arange(n), n, sink).tolist() == now.tolist()
        assert now.max() == now[-1] < P
        count = int(layout.num_sparse(torch.tensor(n)))
        first = min(n, int(layout.window_start(torch.tensor(n))))
        window_positions = torch.arange(first, n)
        rows = layout.row(window_positions)
        for head in range(2):
            held = views.positions[SLOT, head, :count].long()
            expected = rope(raw[held, head, None], now[held].double())[:, 0]
            torch.testing.assert_close(views.sparse_k[SLOT, head, :count], expected)
            expected = rope(raw[window_positions, head, None], now[window_positions].double())[:, 0]
            torch.testing.assert_close(views.exact_k[SLOT, head, rows], expected)
            torch.testing.assert_close(
                views.exact_k[SLOT, head, : min(n, sink)], problem.k[: min(n, sink), head]
            )


def test_the_mass_of_the_hidden_state_stays_below_that_of_the_trained_length():
    """Lemma 6: C divides D, and C does not."""
    for interval, bound in ((4, 1.0), (5, 1 + 5 / 8)):
        config = LolaConfig(
            window_size=4, sparse_cache_size=0, update_interval=interval, feature_dim=8
        )
        problem = make_problem(400, config, places=Places(32, 8))
        state = problem.state()
        feed(portable, problem, state)
        total = state.views.s[SLOT].sum(-1)
        assert (total < 2 * 32 * bound).all() and (total > 32).all()


def test_a_factor_of_the_table_drops_out():
    """YaRN multiplies cosines and sines; a turned key keeps its length."""
    angles = torch.tensor([[0.0, 0.0], [0.3, 2.0]], dtype=torch.float64)
    turn = Turn.of_table(Places(32, 8), 1.3 * angles.cos(), 1.3 * angles.sin())
    k = torch.randn(5, 6, dtype=torch.float64)
    turned = turn.back(k)
    torch.testing.assert_close(turned.norm(dim=-1), k.norm(dim=-1))
    assert torch.equal(turned[:, 4:], k[:, 4:])  # beyond RoPE's dimensions
    one = torch.complex(k[:, 0], k[:, 2]) * torch.exp(torch.tensor(-0.3j, dtype=torch.complex128))
    torch.testing.assert_close(torch.complex(turned[:, 0], turned[:, 2]), one)
