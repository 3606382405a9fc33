"""RoPE positions, and keys after context shifts: RoPE of these positions (Lemma 4)."""

import pytest
import torch

from lola_vllm.core.config import config_class
from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import portable
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.shift_schedule import SCORE_DECAY, SCORE_DECAY_SHIFTS, ShiftSchedule
from tests.support.problem import STATE_INDEX, decode, feed, make_problem


def rope_positions_after(n, P, D, sink, start=0):
    """What algorithm.md says of all positions before the n-th token is processed, step by step."""
    found = []
    for length in range(n):
        if length >= P and (length - P) % D == 0:
            found = [
                at if p < sink else at - D * (at >= start + D) + D * (at < start)
                for p, at in enumerate(found)
            ]
        found.append(length if length < P else P - D + (length - P) % D)
    return found


@pytest.mark.parametrize(("P", "D"), [(8, 4), (8, 1), (32, 8), (30, 5), (12, 6)])
def test_new_tokens_have_rope_positions_below_the_trained_length(P, D):
    schedule = ShiftSchedule(P, D)
    found = schedule.rope_position(torch.arange(5 * P)).tolist()
    assert found[:P] == list(range(P))
    assert all(P - D <= at < P for at in found[P:])
    assert found == [rope_positions_after(p + 1, P, D, 0)[p] for p in range(5 * P)]
    assert (
        schedule.rope_position(torch.tensor([2**31 - 1], dtype=torch.int64))
        == P - D + (2**31 - 1 - P) % D
    )
    due = [n for n in range(5 * P) if schedule.due(n)]
    assert due == list(range(P, 5 * P, D))
    assert schedule.due(torch.arange(5 * P)).nonzero().squeeze(1).tolist() == due


@pytest.mark.parametrize(
    ("P", "D", "start"), [(32, 8, 0), (32, 8, 8), (32, 8, 16), (32, 16, 0), (30, 5, 0), (30, 5, 7)]
)
@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("window", [6, 40])  # 40: longer than what is trained
def test_exact_keys_are_rope_of_their_rope_positions(P, D, start, sink, window):
    """After every number of tokens; and no key comes after the newest."""
    config = LolaConfig(window_size=window, sparse_cache_size=9, update_interval=4, sink_size=sink)
    schedule = ShiftSchedule(P, D, bucket_start=start)
    problem = make_problem(3 * P, config, schedule=schedule)
    raw = problem.k.clone()
    angles = 10.0 ** -torch.arange(8).double()

    def rope(k, at):
        cos, sin = (at[:, None, None] * angles).cos(), (at[:, None, None] * angles).sin()
        one, two = k.chunk(2, -1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    for x in (problem.q, problem.k):
        x.copy_(rope(x, schedule.rope_position(torch.arange(3 * P))))
    state = problem.state()
    layout, views = state.groups[0].layout, state.groups[0].views
    for n in range(1, 3 * P + 1):
        decode(portable, problem, state, n - 1)
        now = torch.tensor(rope_positions_after(n, P, D, sink, start))
        assert schedule.exact_rope_positions(torch.arange(n), n, sink).tolist() == now.tolist()
        assert now.max() == now[-1] < P
        count = int(layout.num_sparse(torch.tensor(n)))
        first = min(n, int(layout.window_start(torch.tensor(n))))
        window_positions = torch.arange(first, n)
        rows = layout.row(window_positions)
        for head in range(2):
            held = views.positions[STATE_INDEX, head, :count].long()
            expected = rope(raw[held, head, None], now[held].double())[:, 0]
            torch.testing.assert_close(views.sparse_k[STATE_INDEX, head, :count], expected)
            expected = rope(raw[window_positions, head, None], now[window_positions].double())[:, 0]
            torch.testing.assert_close(views.exact_k[STATE_INDEX, head, rows], expected)
            torch.testing.assert_close(
                views.exact_k[STATE_INDEX, head, : min(n, sink)], problem.k[: min(n, sink), head]
            )


@pytest.mark.parametrize(("D", "further", "start"), [(1, 8, 6), (2, 4, 6), (4, 2, 6), (8, 1, 0)])
def test_the_schedule_of_a_model_follows_from_its_length(D, further, start):
    """Lemma 4 asks for room before the RoPE positions of new tokens, and m < P / D."""
    config = config_class("llama")(max_position_embeddings=16, lola_config={"context_shift": D})
    schedule = ShiftSchedule.of(config)
    assert schedule == ShiftSchedule(16, D, SCORE_DECAY, SCORE_DECAY_SHIFTS, further, start)
    assert schedule.bucket_start <= 16 - 2 * D and schedule.fold_rotation < 16 // D
    config.lola_config = {"context_shift": 0}
    assert ShiftSchedule.of(config) is None


def test_the_mass_of_the_hidden_state_stays_below_that_of_the_trained_length():
    """Lemma 5: C divides D, and C does not."""
    for interval, bound in ((4, 1.0), (5, 1 + 5 / 8)):
        config = LolaConfig(window_size=4, sparse_cache_size=0, update_interval=interval)
        problem = make_problem(400, config, schedule=ShiftSchedule(32, 8))
        state = problem.state()
        feed(portable, problem, state)
        total = state.groups[0].views.s[STATE_INDEX].sum(-1)
        assert (total < 2 * 32 * bound).all() and (total > 32).all()


def test_a_factor_of_the_table_drops_out():
    """YaRN multiplies cosines and sines; a rotated key keeps its length."""
    angles = torch.tensor([[0.0, 0.0], [0.3, 2.0]], dtype=torch.float64)
    rotation = KeyRotation.of_table(ShiftSchedule(32, 8), 1.3 * angles.cos(), 1.3 * angles.sin())
    k = torch.randn(5, 6, dtype=torch.float64)
    rotated = rotation.rotate_back(k)
    torch.testing.assert_close(rotated.norm(dim=-1), k.norm(dim=-1))
    assert torch.equal(rotated[:, 4:], k[:, 4:])  # beyond RoPE's dimensions
    one = torch.complex(k[:, 0], k[:, 2]) * torch.exp(torch.tensor(-0.3j, dtype=torch.complex128))
    torch.testing.assert_close(torch.complex(rotated[:, 0], rotated[:, 2]), one)
