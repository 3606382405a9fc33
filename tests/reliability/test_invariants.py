"""What must hold of every page, for random parameters, heads, lengths, splits and batches.

Nothing here asks the reference what a page should hold: each property is checked on the page's own
bytes and the pairs that went in.
"""

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import LayerState, cpp, portable
from lola_vllm.core.state import StateViews
from tests.support.effort import cases
from tests.support.problem import Problem, decode, make_problem, prefill

OPS = [pytest.param(portable, id="torch"), pytest.param(cpp, id="cpp")]
# Of sums of a few dozen products: the ops add in another order than the tests do.
CLOSE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2e-4}


@pytest.fixture(scope="module", autouse=True)
def extension():
    assert cpp.load()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Random parameters and heads, and random pairs of a sequence."""
    group = draw(st.integers(1, 3), label="query heads per KV head")
    kv_heads = draw(st.integers(1, 2), label="KV heads")
    config = LolaConfig(
        window_size=draw(st.integers(1, 12), label="window_size"),
        sparse_cache_size=draw(st.integers(0, 9), label="sparse_cache_size"),
        update_interval=draw(st.sampled_from([1, 1, 2, 5, 8, 13]), label="update_interval"),
        sink_size=draw(st.integers(0, 5), label="sink_size"),
        mixing=draw(st.sampled_from(["lola", "lolcats"]), label="mixing"),
        sparse_sharing=draw(st.sampled_from(["none", "kv_head"]), label="sparse_sharing"),
    )
    per_query = draw(st.booleans(), label="maps per query head")
    return make_problem(
        draw(st.integers(1, 70), label="tokens"),
        config,
        Hkv=kv_heads,
        group=group,
        Hs=kv_heads * group if per_query else None,
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), label="dtype"),
        seed=draw(st.integers(0, 2**16), label="seed"),
    )


@st.composite
def schedules(draw: st.DrawFn, length: int) -> list[int]:
    """Ends of the pieces in which a sequence is fed; pieces of one token are decodes."""
    ends = draw(st.sets(st.integers(1, length), max_size=12)) | {length}
    decode_from = draw(st.integers(0, length))
    return sorted(ends | set(range(decode_from + 1, length + 1)))


def feed(
    ops: ModuleType, problem: Problem, state: LayerState, state_index: int, start: int, stop: int
) -> Tensor:
    """Tokens `start` to `stop - 1`; a single one as a decode."""
    if stop - start == 1 and start:
        return decode(ops, problem, state, start, state_index)
    return prefill(ops, problem, state, start, stop, state_index)


def features(problem: Problem, head: int, positions: list[int]) -> tuple[Tensor, Tensor]:
    """phi(k) `[P, 2F]` and v `[P, d]` of a state head, in float64, from the formula."""
    share = problem.feature_map_k.shape[0] // problem.k.shape[1]
    k = problem.k[positions, head // share].double()
    y = k @ problem.feature_map_k[head].double()
    phi = torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=1e-12)
    return phi, problem.v[positions, head // share].double()


def read_sparse(problem: Problem, views: StateViews, state_index: int, n: int) -> list[list[int]]:
    """Positions in each sparse set; their pairs must be those that went in."""
    layout = problem.layout()
    size = int(layout.num_sparse(torch.tensor(n)))
    share = layout.num_sparse_heads // layout.num_kv_heads
    found = []
    for group in range(layout.num_sparse_heads):
        at = views.positions[state_index, group, :size].long()
        assert torch.equal(views.sparse_k[state_index, group, :size], problem.k[at, group // share])
        assert torch.equal(views.sparse_v[state_index, group, :size], problem.v[at, group // share])
        found.append(at.tolist())
    return found


def assert_partition(problem: Problem, views: StateViews, state_index: int, n: int) -> None:
    """Each of n positions is in exactly one of sinks, window, sparse cache and hidden state."""
    layout, config = problem.layout(), problem.config
    last_update = n // config.update_interval * config.update_interval
    start = max(config.sink_size, last_update - config.window_size)
    exact = [*range(min(n, config.sink_size)), *range(start, n)]
    rows = layout.row(torch.tensor(exact))
    assert len(set(rows.tolist())) == len(exact)
    assert torch.equal(views.exact_k[state_index, :, rows].transpose(0, 1), problem.k[exact])
    assert torch.equal(views.exact_v[state_index, :, rows].transpose(0, 1), problem.v[exact])
    sparse = read_sparse(problem, views, state_index, n)
    evicted = set(range(config.sink_size, start))
    for head in range(layout.num_state_heads):
        cached = sparse[head // (layout.num_state_heads // layout.num_sparse_heads)]
        assert len(set(cached)) == len(cached) == min(config.sparse_cache_size, len(evicted))
        assert set(cached) <= evicted
        folded = sorted(evicted - set(cached))
        if folded:
            phi, v = features(problem, head, folded)
            close = CLOSE[problem.q.dtype]
            torch.testing.assert_close(
                views.s[state_index, head].double(), phi.sum(0), rtol=close, atol=close
            )
            torch.testing.assert_close(
                views.H[state_index, head].double(), phi.T @ v, rtol=close, atol=close
            )


@pytest.mark.parametrize("ops", OPS)
@cases(short=25, long=2000)
@given(data=st.data())
def test_every_position_is_in_exactly_one_memory(ops, data):
    problem = data.draw(problems())
    state = problem.state()
    start = 0
    for stop in data.draw(schedules(len(problem.q))):
        out = feed(ops, problem, state, 2, start, stop)
        assert out.isfinite().all()
        assert_partition(problem, state.groups[0].views, 2, stop)
        start = stop


def recall_errors(
    problem: Problem, H: Tensor, s: Tensor, group: int, positions: list[int], empty: bool
) -> Tensor:
    """Scores `[P]` of a sparse set's candidates, in float64, from docs/algorithm.md section 3."""
    layout = problem.layout()
    share = layout.num_state_heads // layout.num_sparse_heads
    errors = []
    for head in range(group * share, (group + 1) * share):
        phi, v = features(problem, head, positions)
        found = torch.zeros_like(v)
        if not empty:
            found = phi @ H[head].double() / ((phi @ s[head].double()) + 1e-6).unsqueeze(-1)
        errors.append((v - found).norm(dim=-1))
    if share == 1:
        return errors[0]
    norm = v.norm(dim=-1).clamp(min=1e-6)  # the state heads of a set share their values
    return torch.stack([error / norm for error in errors]).mean(0)


@pytest.mark.parametrize("ops", OPS)
@cases(short=25, long=2000)
@given(data=st.data())
def test_what_is_kept_is_recalled_no_better_than_what_is_folded(ops, data):
    """At every update, against the hidden state as it was before it."""
    problem = data.draw(problems())
    layout = problem.layout()
    interval, lam = problem.config.update_interval, problem.config.sparse_cache_size
    state = problem.state()
    close = CLOSE[problem.q.dtype]
    piece = data.draw(st.integers(1, interval), label="last piece")
    for n in range(interval, len(problem.q) + 1, interval):
        if interval > piece:
            feed(ops, problem, state, 2, n - interval, n - piece)
        before = layout.views(state.pages.clone())
        feed(ops, problem, state, 2, n - piece, n)
        start, stop = (int(layout.window_start(torch.tensor(m))) for m in (n - interval, n))
        old = read_sparse(problem, before, 2, n - interval)
        new = read_sparse(problem, state.groups[0].views, 2, n)
        empty = int(layout.num_folded(torch.tensor(n - interval))) == 0
        for group in range(layout.num_sparse_heads):
            candidates = old[group] + list(range(start, stop))
            kept, folded = new[group], sorted(set(candidates) - set(new[group]))
            assert set(kept) <= set(candidates)
            assert len(kept) == min(lam, len(candidates))
            if kept and folded:
                H, s = before.H[2], before.s[2]
                worst = recall_errors(problem, H, s, group, kept, empty).min()
                best = recall_errors(problem, H, s, group, folded, empty).max()
                assert worst >= best * (1 - close) - close
