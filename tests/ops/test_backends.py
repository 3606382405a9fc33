"""Every CPU back end against the reference, on odd sizes, splits and batches."""

import os
import random

import pytest
import torch
from instruction_sets import LOWER, run_again
from problem import (
    assert_bounds_hold,
    assert_state_matches,
    assert_unrecallable_stay,
    make_problem,
    poisoned_pool,
    unrecallable,
)

from lola_vllm.config import LolaConfig
from lola_vllm.ops import native, portable

ETA = 10
LENGTHS = [1, ETA - 1, ETA, ETA + 1, 2 * ETA + 3, 61]
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
}


@pytest.fixture(params=["torch", "native", "native-many-threads"])
def ops(request):
    """A back end's module; the C++ extension is part of a development set-up.

    With more threads than heads the C++ prefill divides its work in another way.
    """
    if request.param == "torch":
        yield portable
        return
    assert native.load()
    threads = torch.get_num_threads()
    torch.set_num_threads(16 if request.param == "native-many-threads" else 1)
    yield native
    torch.set_num_threads(threads)


def run(ops, problem, cuts, *, slot=2, decode_from=None, extra_stride=0):
    """Feed the sequence in pieces ending at `cuts`; tokens from `decode_from` on one by one."""
    layout = problem.layout()
    _, views = poisoned_pool(layout, 4, extra_stride)
    out = torch.full_like(problem.q, torch.nan)
    T = len(problem.q)
    decode_from = T if decode_from is None else decode_from
    start = 0
    for stop in sorted({c for c in cuts if 0 < c < decode_from} | ({decode_from} - {0})):
        ops.prefill(
            problem.q[start:stop], problem.k[start:stop], problem.v[start:stop],
            problem.weights(), layout, views, torch.tensor([slot], dtype=torch.int32),
            torch.tensor([0, stop - start]), torch.tensor([start]), out[start:stop],
        )  # fmt: skip
        start = stop
    for t in range(decode_from, T):
        ops.decode(
            problem.q[t : t + 1], problem.k[t : t + 1], problem.v[t : t + 1],
            problem.weights(), layout, views, torch.tensor([slot], dtype=torch.int32),
            torch.tensor([t + 1]), out[t : t + 1],
        )  # fmt: skip
    return out, layout, views


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("interval", [1, 7, ETA])
@pytest.mark.parametrize("lam", [0, 1, 5, 100])
@pytest.mark.parametrize("T", LENGTHS)
def test_prefill_and_decode_equal_the_reference(ops, T, lam, interval, dtype):
    config = LolaConfig(
        window_size=ETA, sparse_cache_size=lam, update_interval=interval, feature_dim=8
    )
    problem = make_problem(T, config, dtype=dtype, seed=T + lam)
    expected, _ = problem.reference()
    for decode_from in (T, 0, T // 2):
        out, layout, views = run(ops, problem, [], decode_from=decode_from)
        torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
        assert_state_matches(problem, layout, views, 2, T, **TOLERANCE[dtype])


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("sharing", ["none", "kv_head"])
@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
@pytest.mark.parametrize("sink", [0, 4])
def test_head_layouts_mixings_and_sinks(ops, group, per_query_head, sharing, mixing, sink):
    config = LolaConfig(
        window_size=ETA, sparse_cache_size=6, update_interval=4, feature_dim=8,
        sparse_sharing=sharing, mixing=mixing, sink_size=sink,
    )  # fmt: skip
    Hs = 2 * group if per_query_head else 2
    problem = make_problem(57, config, group=group, Hs=Hs, seed=group)
    expected, _ = problem.reference()
    out, layout, views = run(ops, problem, [5, 6, 31], decode_from=40, extra_stride=192)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert_state_matches(problem, layout, views, 2, 57, rtol=1e-9, atol=1e-9)


def test_any_split_gives_the_same_state(ops):
    config = LolaConfig(window_size=ETA, sparse_cache_size=8, update_interval=7, feature_dim=8)
    problem = make_problem(90, config)
    expected, _ = problem.reference()
    for seed in range(8):
        rng = random.Random(seed)
        cuts = rng.sample(range(1, 90), rng.randrange(0, 20))
        out, layout, views = run(ops, problem, cuts, decode_from=rng.choice([90, 70]))
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        assert_state_matches(problem, layout, views, 2, 90, rtol=1e-9, atol=1e-9)


def test_batch_rows_are_independent_and_padding_touches_nothing(ops):
    config = LolaConfig(
        window_size=ETA, sparse_cache_size=5, update_interval=7, feature_dim=8, sink_size=2
    )
    lengths = [1, 9, 10, 23, 57]
    problems = [make_problem(T + 3, config, seed=T) for T in lengths]
    for p in problems[1:]:  # one layer: the rows share the weights
        p.feature_map_q, p.feature_map_k = problems[0].feature_map_q, problems[0].feature_map_k
        p.window_factors = problems[0].window_factors
    layout, weights = problems[0].layout(), problems[0].weights()
    pages, views = poisoned_pool(layout, 8)
    slots = torch.tensor([3, 0, 1, 7, 5, 4], dtype=torch.int32)  # row 1 is padding
    rows = [problems[0], problems[1], *problems[1:]]
    counts = [1, 4, 9, 10, 23, 57]

    def pack(name, span):
        return torch.cat([getattr(p, name)[span(c)] for p, c in zip(rows, counts, strict=True)])

    out = torch.full_like(pack("q", lambda c: slice(0, c)), torch.nan)
    starts = torch.tensor([0, *counts]).cumsum(0)
    ops.prefill(
        *(pack(x, lambda c: slice(0, c)) for x in "qkv"), weights, layout, views, slots,
        starts, torch.zeros(6, dtype=torch.long), out,
    )  # fmt: skip
    assert (out[1:5] == 0).all()
    for step in range(3):
        step_out = torch.full((6, *out.shape[1:]), torch.nan, dtype=out.dtype)
        ops.decode(
            *(pack(x, lambda c, at=step: slice(c + at, c + at + 1)) for x in "qkv"),
            weights, layout, views, slots, torch.tensor(counts) + step + 1, step_out,
        )  # fmt: skip
        assert (step_out[1] == 0).all()
        for i in (0, 2, 3, 4, 5):
            expected = rows[i].reference()[0][counts[i] + step]
            torch.testing.assert_close(step_out[i], expected, rtol=1e-9, atol=1e-9)
    for i in (0, 2, 3, 4, 5):
        expected = rows[i].reference()[0][: counts[i]]
        torch.testing.assert_close(out[starts[i] : starts[i + 1]], expected, rtol=1e-9, atol=1e-9)
        n = counts[i] + 3
        assert_state_matches(rows[i], layout, views, int(slots[i]), n, rtol=1e-9, atol=1e-9)
    for page in (0, 2, 6):
        assert (pages[page] == 0xFF).all()


def test_long_window_is_cut_into_bounded_pieces(ops, monkeypatch):
    monkeypatch.setattr(portable, "MAX_PIECE", 16)
    config = LolaConfig(window_size=50, sparse_cache_size=8, feature_dim=8)
    problem = make_problem(160, config)
    out, layout, views = run(ops, problem, [])
    torch.testing.assert_close(out, problem.reference()[0], rtol=1e-9, atol=1e-9)
    assert_state_matches(problem, layout, views, 2, 160, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
def test_extreme_logits_stay_finite(ops, mixing):
    config = LolaConfig(
        window_size=ETA, sparse_cache_size=5, update_interval=3, feature_dim=8, mixing=mixing
    )
    problem = make_problem(60, config, dtype=torch.float32, scale=6.0)
    logits = torch.einsum("qhd,khd->hqk", problem.q[:, ::3], problem.k) / 4
    assert logits.abs().max() > 100
    out, *_ = run(ops, problem, [], decode_from=30)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), problem.reference()[0], rtol=1e-3, atol=1e-3)


def test_ties_keep_the_older_pair(ops):
    """Equal tokens in layer 0 share v, so their errors against an empty state are exactly equal."""
    config = LolaConfig(window_size=4, sparse_cache_size=3, update_interval=12, feature_dim=8)
    problem = make_problem(13, config)
    problem.v[:] = problem.v[0]
    for decode_from in (13, 3):
        _, layout, views = run(ops, problem, [5], decode_from=decode_from)
        assert views.positions[2].sort(-1).values.tolist() == [[0, 1, 2]] * 2
        assert_state_matches(problem, layout, views, 2, 13, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("interval", [1, 5, 9])
@pytest.mark.parametrize("sharing", ["none", "kv_head"])
def test_scores_that_are_no_numbers_count_as_the_largest(ops, interval, sharing, dtype):
    problem = unrecallable(interval, sharing, dtype)
    for decode_from in (40, 0):
        _, layout, views = run(ops, problem, [], decode_from=decode_from)
        assert_unrecallable_stay(problem, layout, views, 2)


@pytest.mark.parametrize("d", [8, 16, 24, 64, 80])
@pytest.mark.parametrize("group", [1, 3, 5])
def test_bfloat16_prefill_equals_the_reference(ops, d, group):
    """With avx512_bf16, heads of whole vectors are multiplied as bfloat16."""
    config = LolaConfig(window_size=37, sparse_cache_size=53, feature_dim=8, sink_size=3)
    problem = make_problem(260, config, group=group, d=d, dtype=torch.bfloat16, scale=2.0)
    expected, _ = problem.reference()
    for cuts in ([], [1, 38, 39, 150]):
        out, layout, views = run(ops, problem, cuts)
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
        assert_state_matches(problem, layout, views, 2, 260, rtol=1e-4, atol=1e-4)


def test_bfloat16_prefill_rounds_once(ops):
    """Answers are the reference's rounded to bfloat16, but for those that lie between two values.

    Softmax weights of 8 bits would make one in seven another.
    """
    config = LolaConfig(window_size=64, sparse_cache_size=64, feature_dim=16)
    problem = make_problem(300, config, group=3, d=64, dtype=torch.bfloat16)
    out, _, _ = run(ops, problem, [])
    expected, _ = problem.reference()
    assert (out != expected.to(torch.bfloat16)).float().mean() < 0.03


def test_threads_change_no_bit():
    """However prompts are shared out: fewer streams than threads, as many, more."""
    assert native.load()
    config = LolaConfig(window_size=16, sparse_cache_size=24, feature_dim=8, sink_size=2)
    problem = make_problem(230, config, group=3, d=32, dtype=torch.bfloat16)
    layout, before = problem.layout(), torch.get_num_threads()
    starts = torch.tensor([0, 101, 102, 230])
    slots = torch.tensor([3, 1, 2], dtype=torch.int32)
    found = []
    for threads in (1, 2, 3, 7, 16):
        torch.set_num_threads(threads)
        pool, views = poisoned_pool(layout, 4)
        pool.fill_(0)
        out = torch.empty_like(problem.q)
        native.prefill(
            problem.q, problem.k, problem.v, problem.weights(), layout, views, slots, starts,
            torch.zeros(3, dtype=torch.int64), out,
        )  # fmt: skip
        found.append((out, pool.clone()))
    torch.set_num_threads(before)
    for out, pool in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(pool, found[0][1])


@pytest.mark.parametrize("d", [16, 20, 32, 64, 96])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
def test_bfloat16_decode_equals_the_reference(ops, d, group):
    """With avx512_bf16, logits of heads of whole vectors are products of bfloat16."""
    config = LolaConfig(
        window_size=13, sparse_cache_size=11, update_interval=5, feature_dim=8, sink_size=3
    )
    problem = make_problem(70, config, group=group, d=d, dtype=torch.bfloat16, scale=2.0)
    expected, _ = problem.reference()
    out, layout, views = run(ops, problem, [], decode_from=9)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
    assert_state_matches(problem, layout, views, 2, 70, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [20, 64])
def test_a_decoded_row_does_not_depend_on_batch_or_threads(dtype, d):
    """Bit by bit: threads take turns, and the rows of a turn share their feature maps."""
    assert native.load()
    config = LolaConfig(window_size=ETA, sparse_cache_size=21, update_interval=5, feature_dim=24)
    rows, T = 41, 60
    problem = make_problem(T, config, dtype=dtype, d=d, group=3)
    q, k, v = (torch.randn(rows, *x.shape[1:]).to(dtype) for x in (problem.q, problem.k, problem.v))
    lengths = torch.tensor([T + 1 - row % 7 * 9 for row in range(rows)])
    threads, answers = torch.get_num_threads(), []
    for batch, count in ((1, 1), (rows, 1), (rows, 2), (rows, 5), (7, 3)):
        torch.set_num_threads(count)
        layout = problem.layout()
        _, views = poisoned_pool(layout, rows + 1, 0)
        slots = torch.arange(1, rows + 1, dtype=torch.int32)
        for row in range(rows):
            n = int(lengths[row]) - 1
            native.prefill(
                problem.q[:n], problem.k[:n], problem.v[:n], problem.weights(), layout, views,
                slots[row : row + 1], torch.tensor([0, n]), torch.tensor([0]),
                torch.empty_like(problem.q[:n]),
            )  # fmt: skip
        out = torch.full_like(q, torch.nan)
        for at in range(0, rows, batch):
            part = slice(at, at + batch)
            native.decode(
                q[part], k[part], v[part], problem.weights(), layout, views, slots[part],
                lengths[part], out[part],
            )  # fmt: skip
        answers.append((out, views.H[1:].clone()))
    torch.set_num_threads(threads)
    for out, H in answers[1:]:
        assert torch.equal(out, answers[0][0])
        assert torch.equal(H.view(torch.int32), answers[0][1].view(torch.int32))


@pytest.mark.parametrize("isa", LOWER)
@pytest.mark.skipif("LOLA_VLLM_CPU_ISA" in os.environ, reason="is the inner run")
def test_lower_instruction_sets(isa):
    """The native part of this file again, on one thread, on what an older machine would run."""
    run_again(isa, __file__, "not torch] and not [torch and not many")


def test_page_offsets_are_64_bit():
    """A page that begins 2^31 elements behind the first gives what it gives beside it."""
    assert native.load()
    problem = make_problem(
        61, LolaConfig(window_size=ETA, sparse_cache_size=5, feature_dim=8), dtype=torch.float32
    )
    layout = problem.layout()
    out, _, near = run(native, problem, [17], slot=1)
    try:
        room = torch.empty(2**33 + layout.page_bytes, dtype=torch.uint8)
    except RuntimeError:
        pytest.skip("8 GiB of address space are not to be had")
    pages = room.as_strided((2, layout.page_bytes), (2**33, 1))
    pages[1] = 0xFF
    far_out = torch.full_like(out, torch.nan)
    for start, stop in ((0, 17), (17, 61)):
        native.prefill(
            problem.q[start:stop], problem.k[start:stop], problem.v[start:stop],
            problem.weights(), layout, layout.views(pages), torch.tensor([1]),
            torch.tensor([0, stop - start]), torch.tensor([start]), far_out[start:stop],
        )  # fmt: skip
    assert torch.equal(far_out, out)
    assert torch.equal(layout.views(pages).H[1], near.H[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [32, 20])
def test_bounded_scores_make_the_same_choices(dtype, d):
    """A long prompt, where most scores are only bounded, against steps that compute them all."""
    assert native.load()
    config = LolaConfig(window_size=16, sparse_cache_size=96, feature_dim=16)
    problem = make_problem(2000, config, dtype=dtype, d=d, group=1)
    problem.v *= torch.linspace(1, 3, 2000).unsqueeze(-1).unsqueeze(-1).to(dtype)  # a trend
    (_, bounded), (_, stepwise) = (
        run(native, problem, [700], decode_from=from_)[1:] for from_ in (2000, 0)
    )
    for name in ("positions", "sparse_k", "sparse_v", "H", "s"):
        assert torch.equal(getattr(bounded, name)[2], getattr(stepwise, name)[2]), name


@pytest.mark.parametrize(
    "dtype, d, lam, sharing",
    [
        (torch.float32, 16, 32, "none"),
        (torch.float64, 20, 33, "none"),
        (torch.bfloat16, 20, 70, "none"),
        (torch.float64, 16, 33, "kv_head"),
    ],
)
def test_interval_1_makes_the_same_choices_for_thousands_of_tokens(dtype, d, lam, sharing):
    """Scores that are mostly bounded against scores computed anew at each token."""
    assert native.load()
    config = LolaConfig(
        window_size=8, sparse_cache_size=lam, update_interval=1, feature_dim=16,
        sparse_sharing=sharing,
    )  # fmt: skip
    group = 2 if sharing == "kv_head" else 1
    problem = make_problem(2500, config, dtype=dtype, d=d, group=group, Hs=2 * group)
    problem.v *= torch.linspace(1, 3, 2500).unsqueeze(-1).unsqueeze(-1).to(dtype)  # a trend
    pages = [run(ops, problem, [], decode_from=0)[1:] for ops in (portable, native)]
    (_, direct), (layout, kept) = pages
    for name in ("positions", "sparse_k", "sparse_v", "exact_k", "exact_v"):
        assert torch.equal(getattr(direct, name)[2], getattr(kept, name)[2]), name
    torch.testing.assert_close(direct.H[2], kept.H[2], rtol=1e-4, atol=1e-4)
    assert_bounds_hold(problem, layout, kept, 2)
