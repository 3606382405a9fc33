"""Checks of the Triton back end in its interpreter: `python triton_driver.py GROUP [xformers]`.

Run in a process of its own with TRITON_INTERPRET=1, which must be set before Triton is imported.
Each group prints a line per check and ends with the number of checks. With `xformers` a stand-in
for it does the softmax part of prefill (`xformers_standin.py`), and a last line counts its calls.
"""

import dataclasses
import itertools
import sys

import long_run
import torch
from problem import (
    Problem,
    assert_bounds_hold,
    assert_state_matches,
    assert_unrecallable_stay,
    full_attention,
    make_problem,
    poisoned_pool,
    unrecallable,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lola_vllm.config import LolaConfig
from lola_vllm.kernels import aot, backend, decode, prefill, warmup
from lola_vllm.kernels.common import pairs_per_tile
from lola_vllm.ops import portable

ETA = 10
SLOT = 2
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
XFORMERS = sys.argv[2:] == ["xformers"]
if XFORMERS:
    import xformers_standin

    backend = xformers_standin.install()


def run(problem, cuts=(), *, decode_from=None, extra_stride=0, ops=backend, **options):
    """Feed a sequence in pieces ending at `cuts`; tokens from `decode_from` on one by one."""
    layout, weights = problem.layout(), problem.weights()
    pages, views = poisoned_pool(layout, 4, extra_stride)
    out = torch.full_like(problem.q, torch.nan)
    T = len(problem.q)
    decode_from = T if decode_from is None else decode_from
    slots = torch.tensor([SLOT], dtype=torch.int32)
    start = 0
    for stop in sorted({c for c in cuts if 0 < c < decode_from} | ({decode_from} - {0})):
        ops.prefill(
            problem.q[start:stop], problem.k[start:stop], problem.v[start:stop], weights, layout,
            views, slots, torch.tensor([0, stop - start]), torch.tensor([start]), out[start:stop],
        )  # fmt: skip
        start = stop
    for t in range(decode_from, T):
        ops.decode(
            problem.q[t : t + 1], problem.k[t : t + 1], problem.v[t : t + 1], weights, layout,
            views, slots, torch.tensor([t + 1], dtype=torch.int32), out[t : t + 1], **options,
        )  # fmt: skip
    for page in {0, 1, 2, 3} - {SLOT}:
        assert (pages[page] == 0xFF).all(), f"page {page} was touched"
    return out, layout, views


def check(problem: Problem, *args, **kwargs) -> None:
    """The outputs and the page equal the reference's; the slots are filled as in torch."""
    out, layout, views = run(problem, *args, **kwargs)
    torch.testing.assert_close(out.double(), problem.reference()[0], **TOLERANCE)
    T = len(problem.q)
    assert_state_matches(problem, layout, views, SLOT, T, **TOLERANCE)
    _, _, expected = run(problem, ops=portable)
    filled = int(layout.num_sparse(torch.tensor(T)))
    assert torch.equal(views.positions[SLOT, :, :filled], expected.positions[SLOT, :, :filled]), (
        "the slots are arranged in another way than the torch back end's"
    )


class NoWait(TorchDispatchMode):
    """Refuses the operators that make a host wait for a GPU or give shapes that hang on data."""

    WAITING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in self.WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def config_of(**kwargs) -> LolaConfig:
    return LolaConfig(**{"window_size": ETA, "feature_dim": 8, **kwargs})


def lengths():
    """T around the window, lam from none to more than enough, C from 1 to the window."""
    intervals = (7, ETA) if XFORMERS else (1, 7, ETA)  # too short a one is Triton's alone
    for interval, lam in itertools.product(intervals, (0, 1, 5, 100)):
        for T in (1, ETA - 1, ETA, ETA + 1, 2 * ETA + 3):
            config = config_of(sparse_cache_size=lam, update_interval=interval)
            problem = make_problem(T, config, group=1, dtype=torch.float32, seed=T + lam)
            for decode_from in {T, T // 2}:
                check(problem, decode_from=decode_from)
            yield f"C {interval}, lam {lam}, T {T}"


def each_token():
    """Interval 1, where most scores are only bounded: the torch back end computes them all."""
    for T, lam, share, d, F in ((130, 24, 1, 16, 16), (100, 17, 2, 20, 9)):
        config = config_of(
            window_size=4, sparse_cache_size=lam, update_interval=1, feature_dim=F,
            sparse_sharing="none" if share == 1 else "kv_head",
        )  # fmt: skip
        problem = make_problem(T, config, group=share, Hkv=1, Hs=share, d=d, dtype=torch.float32)
        problem.v *= torch.linspace(1, 3, T).unsqueeze(-1).unsqueeze(-1)  # a trend
        _, layout, views = run(problem, [30, 31], decode_from=T // 2)
        _, _, direct = run(problem, ops=portable)
        for name in ("positions", "sparse_k", "sparse_v", "exact_k", "exact_v"):
            assert torch.equal(getattr(views, name)[SLOT], getattr(direct, name)[SLOT]), name
        torch.testing.assert_close(views.H[SLOT], direct.H[SLOT], **TOLERANCE)
        assert_bounds_hold(problem, layout, views, SLOT)
        yield f"{share} state heads per set"


def heads():
    """GQA groups, maps per query head, shared sets, mixings, sinks and wide page strides."""
    cases = [
        (1, False, "none", "lola", 0),
        (1, True, "kv_head", "lolcats", 4),
        (3, False, "none", "lolcats", 4),
        (3, True, "none", "lola", 4),
        (3, True, "kv_head", "lola", 0),
        (4, False, "kv_head", "lola", 4),
        (4, True, "none", "lolcats", 0),
        (4, True, "kv_head", "lolcats", 4),
    ]
    for group, per_query_head, sharing, mixing, sink in cases:
        config = config_of(
            sparse_cache_size=6, update_interval=4, sparse_sharing=sharing, mixing=mixing,
            sink_size=sink,
        )  # fmt: skip
        Hs = 2 * group if per_query_head else 2
        problem = make_problem(39, config, group=group, Hs=Hs, dtype=torch.float32, seed=group)
        check(problem, [2, 5, 6, 25], decode_from=30, extra_stride=192)
        yield f"group {group}, Hs {Hs}, {sharing}, {mixing}, sinks {sink}"


def splits():
    """Any split of the prompt, and any split of a decode step's pairs, end in the same state."""
    config = config_of(sparse_cache_size=8, update_interval=7)
    problem = make_problem(60, config, group=1, dtype=torch.float32)
    for cuts, decode_from in (
        ([], 60), ([7, 14, 21], 60), ([1, 2, 3, 20, 33], 50), ([16], 17), (range(60), 60)
    ):  # fmt: skip
        check(problem, cuts, decode_from=decode_from)
        yield f"cuts {list(cuts)}, decode from {decode_from}"
    tile = pairs_per_tile(problem.layout())
    config = config_of(sparse_cache_size=2 * tile + 5, window_size=30, update_interval=12)
    problem = make_problem(190, config, group=2, Hkv=1, dtype=torch.float32)
    for mixing, parts in itertools.product(("lola", "lolcats"), (1, 2, 4)):
        problem.config = config.model_copy(update={"mixing": mixing})
        check(problem, decode_from=186, splits=parts)
        yield f"{mixing}, {parts} parts of the pairs"


def sizes():
    """Head and feature sizes that are no powers of two, tiles that are full, long intervals."""
    for d, F, lam, window, interval in (
        (24, 20, 9, 12, 12), (40, 5, 70, 9, 17), (16, 36, 3, 70, 80), (5, 1, 2, 3, 2),
    ):  # fmt: skip
        T = window + 2 * max(interval, lam) + 5
        config = LolaConfig(
            window_size=window, sparse_cache_size=lam, update_interval=interval, feature_dim=F
        )
        problem = make_problem(T, config, d=d, group=2, Hkv=1, dtype=torch.float32, seed=d)
        check(problem, decode_from=T - 3)
        yield f"d {d}, F {F}, lam {lam}, eta {window}, C {interval}"
    plain = make_problem(90, LolaConfig(window_size=100, feature_dim=8), dtype=torch.float32)
    out, *_ = run(plain, [33], decode_from=87)
    torch.testing.assert_close(out.double(), full_attention(plain), **TOLERANCE)
    yield "a window longer than the sequence is softmax attention"


def batch():
    """Rows of different lengths are independent; padding touches nothing and answers zero.

    And no call looks at a value of a device tensor on the host.
    """
    config = config_of(sparse_cache_size=5, update_interval=7, sink_size=2)
    counts = [1, 14, 9, 10, 23, 57]  # row 1 is padding, and at an update point
    rows = [make_problem(T + 3, config, dtype=torch.float32, seed=T) for T in counts]
    for row in rows[1:]:  # one layer: the rows share the weights
        row.feature_map_q, row.feature_map_k = rows[0].feature_map_q, rows[0].feature_map_k
        row.window_factors = rows[0].window_factors
    layout, weights = rows[0].layout(), rows[0].weights()
    starts = torch.tensor([0, *counts]).cumsum(0)
    # Slots as vLLM hands them over: a column of a table.
    slots = torch.tensor([[3, 9], [0, 9], [1, 9], [7, 9], [5, 9], [4, 9]], dtype=torch.int32)[:, 0]
    live = (0, 2, 3, 4, 5)

    def pack(span):
        """q, k and v as slices of one projection, so with a row stride of their sum."""
        parts = [
            torch.cat([getattr(row, x)[span(c)].flatten(1) for x in "qkv"], 1)
            for row, c in zip(rows, counts, strict=True)
        ]
        q, k, v = torch.cat(parts).split([96, 32, 32], dim=1)
        return q.unflatten(1, (6, 16)), k.unflatten(1, (2, 16)), v.unflatten(1, (2, 16))

    for parts in (1, 2):
        pages, views = poisoned_pool(layout, 8)
        q, k, v = pack(lambda c: slice(0, c))
        out = torch.full_like(q.contiguous(), torch.nan)
        context = torch.zeros(6, dtype=torch.int32)
        with NoWait():
            backend.prefill(q, k, v, weights, layout, views, slots, starts, context, out)
        assert (out[1:15] == 0).all()
        for step in range(3):
            q, k, v = pack(lambda c, at=step: slice(c + at, c + at + 1))
            answer = torch.full_like(q.contiguous(), torch.nan)
            seq_lens = torch.tensor(counts, dtype=torch.int32) + step + 1
            seq_lens[1] = 0 if parts == 1 else 21  # vLLM's padding says 0, the contract nothing
            inputs = (q, k, v, weights, layout, views, slots, seq_lens, answer)
            with NoWait():
                backend.decode(*inputs, splits=parts)
            assert (answer[1] == 0).all()
            for i in live:
                expected = rows[i].reference()[0][counts[i] + step]
                torch.testing.assert_close(answer[i].double(), expected, **TOLERANCE)
        for i in live:
            expected = rows[i].reference()[0][: counts[i]]
            got = out[starts[i] : starts[i + 1]].double()
            torch.testing.assert_close(got, expected, **TOLERANCE)
            assert_state_matches(rows[i], layout, views, int(slots[i]), counts[i] + 3, **TOLERANCE)
        for page in (0, 2, 6):
            assert (pages[page] == 0xFF).all()
        yield f"six rows, {parts} parts"

    # More rows than one look at the token counts takes: 300, of which few are due at once.
    short = config_of(window_size=2, sparse_cache_size=1, update_interval=3, feature_dim=2)
    one = make_problem(9, short, group=1, Hkv=1, d=4, dtype=torch.float32)
    layout, weights = one.layout(), one.weights()
    pages, views = poisoned_pool(layout, 301)
    counts = torch.where(torch.arange(300) % 100 == 99, 9, 4)
    tokens = torch.cat([torch.arange(c) for c in counts.tolist()])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    out = torch.full_like(one.q[tokens], torch.nan)
    slots = torch.arange(1, 301)
    backend.prefill(
        one.q[tokens], one.k[tokens], one.v[tokens], weights, layout, views, slots, starts,
        torch.zeros(300, dtype=torch.long), out,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), one.reference()[0][tokens], **TOLERANCE)
    for slot in (100, 200, 300):
        assert_state_matches(one, layout, views, slot, 9, **TOLERANCE)
    yield "300 rows"


def live():
    """Ragged rows go on with pages in use, beside padding that claims tokens of a NaN page."""
    for lam, sink, Hs in ((0, 0, 2), (5, 2, 2), (5, 2, 6), (100, 3, 2)):
        config = config_of(sparse_cache_size=lam, update_interval=7, sink_size=sink)
        # Tokens in the page, new ones, slot.
        batch = [
            (13, 20, 3),
            (25, 9, 0),
            (0, 16, 1),
            (8, 30, -1),
            (41, 1, 4),
            (1, 30, 6),
            (7, 0, 5),
        ]
        first, *_ = rows = [
            make_problem(old + new, config, Hs=Hs, dtype=torch.float32, seed=old)
            for old, new, _ in batch
        ]
        for row in rows:
            row.feature_map_q, row.feature_map_k = first.feature_map_q, first.feature_map_k
            row.window_factors = first.window_factors
        layout, weights = first.layout(), first.weights()
        pages, views = poisoned_pool(layout, 8, extra_stride=64)

        def feed(some, layout=layout, weights=weights, views=views):
            """One call on (row, start, stop, slot) each; its output per row."""
            q, k, v = (
                torch.cat([getattr(row, x)[start:stop] for row, start, stop, _ in some])
                for x in "qkv"
            )
            counts = [stop - start for _, start, stop, _ in some]
            out = torch.full_like(q, torch.nan)
            backend.prefill(
                q, k, v, weights, layout, views, torch.tensor([s for *_, s in some]),
                torch.tensor([0, *counts]).cumsum(0), torch.tensor([r[1] for r in some]), out,
            )  # fmt: skip
            return out.split(counts)

        for row, (old, _, slot) in zip(rows, batch, strict=True):
            if slot > 0 and old:
                feed([(row, 0, old, slot)])
        answers = feed(
            [(row, old, old + new, s) for row, (old, new, s) in zip(rows, batch, strict=True)]
        )
        for row, answer, (old, new, slot) in zip(rows, answers, batch, strict=True):
            if slot <= 0:
                assert (answer == 0).all()
                continue
            torch.testing.assert_close(answer.double(), row.reference()[0][old:], **TOLERANCE)
            assert_state_matches(row, layout, views, slot, old + new, **TOLERANCE)
        assert all((pages[page] == 0xFF).all() for page in (0, 2, 7))
        yield f"lam {lam}, {sink} sinks, Hs {Hs}"


def hard():
    """Logits of +-100, equal scores, NaN scores, and the 16-bit dtypes."""
    for mixing in ("lola", "lolcats"):
        config = config_of(sparse_cache_size=5, update_interval=3, mixing=mixing)
        problem = make_problem(40, config, dtype=torch.float32, scale=6.0)
        logits = torch.einsum("qhd,khd->hqk", problem.q[:, ::3], problem.k) / 4
        assert logits.abs().max() > 100
        for parts in (1, 2):
            out, *_ = run(problem, decode_from=20, splits=parts)
            assert out.isfinite().all()
            expected = problem.reference()[0]
            torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
        yield f"large logits, {mixing}"

    # Features far below the floor: s holds the floor's sum, to the last bits.
    config = LolaConfig(window_size=4, sparse_cache_size=3, update_interval=3, feature_dim=8)
    problem = make_problem(9, config, dtype=torch.float32, scale=40.0)
    _, _, views = run(problem)
    expected = problem.reference()[1].s
    assert expected.min() < 3e-12
    torch.testing.assert_close(views.s[SLOT].double(), expected, rtol=1e-4, atol=0)
    yield "the features' floor"

    # Equal tokens share v, so their errors against an empty state are exactly equal.
    config = LolaConfig(window_size=4, sparse_cache_size=3, update_interval=12, feature_dim=8)
    problem = make_problem(13, config, dtype=torch.float32)
    problem.v[:] = problem.v[0]
    for decode_from in (13, 3):
        _, layout, views = run(problem, [5], decode_from=decode_from)
        assert views.positions[SLOT].sort(-1).values.tolist() == [[0, 1, 2]] * 2
        assert_state_matches(problem, layout, views, SLOT, 13, **TOLERANCE)
    # Two values: the larger norm wins whatever its age, and the younger ties lose.
    problem.v[5:7] = 2 * problem.v[0]
    _, layout, views = run(problem)
    assert views.positions[SLOT].sort(-1).values.tolist() == [[0, 5, 6]] * 2
    yield "ties"

    # A NaN in the data must not cost a neighbour its slot: as many stay as there are slots.
    config = config_of(sparse_cache_size=4, update_interval=5)
    for sign in (1.0, -1.0):
        problem = make_problem(40, config, dtype=torch.float32)
        problem.v[3, 0] = torch.tensor(torch.nan).copysign(torch.tensor(sign))
        _, layout, views = run(problem)
        positions = views.positions[SLOT]
        assert (positions[0] == 3).any() and all(len(set(p.tolist())) == 4 for p in positions)
        _, _, torch_views = run(problem, ops=portable)
        assert torch.equal(positions, torch_views.positions[SLOT])
    yield "a NaN value"
    for interval, sharing in itertools.product((5,) if XFORMERS else (1, 5), ("none", "kv_head")):
        problem = unrecallable(interval, sharing, torch.float32)
        _, layout, views = run(problem, decode_from=20)
        assert_unrecallable_stay(problem, layout, views, SLOT)
    yield "scores that are no numbers"

    # The reference sees the same inputs. Bounds are wide because the interpreter cuts float32 off
    # to bfloat16, where a GPU rounds; what must hold exactly is which pairs stay.
    for dtype, atol in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        config = LolaConfig(window_size=8, sparse_cache_size=4, feature_dim=8)
        problem = make_problem(50, config, dtype=dtype, seed=1)
        out, layout, views = run(problem, decode_from=30)
        torch.testing.assert_close(out.double(), problem.reference()[0], rtol=0, atol=atol)
        assert_state_matches(problem, layout, views, SLOT, 50, **TOLERANCE)
        yield f"{dtype}"


def long():
    """What is folded into the state of a long sequence arrives, and errors stay small."""

    def feed(problem, layout, views, start, stop, skipped):
        ops = portable if start == 0 else backend
        ops.prefill(
            *(x[start:stop] for x in (problem.q, problem.k, problem.v)), problem.weights(),
            layout, views, torch.tensor([long_run.SLOT]), torch.tensor([0, stop - start]),
            torch.tensor([start + skipped]), torch.empty_like(problem.q[start:stop]),
        )  # fmt: skip

    for interval, folded, tokens, part in (
        (1, 200_000, 100, 1e-3), (64, 200_000, 320, 1e-3),
        (1, 10_000_000, 200, 1e-2), (64, 10_000_000, 320, 1e-2),
    ):  # fmt: skip
        problem = long_run.long_problem(interval, tokens, Hkv=1)
        arrived = long_run.gain(feed, problem, folded)
        assert arrived.s.abs().max() < part and arrived.H.abs().max() < part
        assert arrived.error_at(10_000_000) < 1e-4
        yield f"C {interval}, {folded} folded"


def arguments():
    """Wrong arguments raise and are named; a plan does not depend on how it is asked for."""
    problem = make_problem(4, config_of(), dtype=torch.float32)
    layout, weights = problem.layout(), problem.weights()
    _, views = poisoned_pool(layout, 4)
    good = {
        "q": problem.q, "k": problem.k, "v": problem.v, "weights": weights, "layout": layout,
        "views": views, "slots": torch.arange(4), "seq_lens": torch.ones(4, dtype=torch.long),
        "out": torch.empty_like(problem.q),
    }  # fmt: skip
    backend.decode(**good)
    for name, bad in (
        ("k", problem.k[:, :1]),
        ("v", problem.v.double()),
        ("q", problem.q.transpose(0, 2).contiguous().transpose(0, 2)),
        ("slots", torch.arange(3)),
        ("exact_v", views._replace(exact_v=views.exact_v.clone())),
    ):
        try:
            backend.decode(**{**good, "views" if name == "exact_v" else name: bad})
        except ValueError as error:
            assert name in str(error), f"{error} does not name {name}"
        else:
            raise AssertionError(f"a bad {name} was taken")
    yield "bad arguments are named"

    page = aot.llama_8b()
    decode.num_processors = lambda device: 132
    device = torch.device("cpu")
    counts = [decode.choose_splits(page, rows, device) for rows in (1, 4, 16, 17, 512)]
    assert counts == [8, 8, 2, 1, 1]  # 640 pairs are 10 tiles; two programs per processor
    yield "splits follow the shapes"

    layout = make_problem(1, config_of(update_interval=7, sink_size=2)).layout()
    start, context = torch.tensor([0, 30, 30, 31, 60]).numpy(), torch.tensor([0, 5, 27, 8]).numpy()
    plan = prefill.plan_pieces(start, context, layout)
    token, position, length, stop, row = plan.pieces
    # eta + sinks + 1 = 13, so 14 is the first point at which a pair leaves the window.
    assert list(zip(row, position, stop, strict=True)) == [
        (0, 0, 14), (2, 27, 28), (3, 8, 14), (0, 14, 21), (3, 14, 21), (0, 21, 28), (3, 21, 28),
        (0, 28, 30), (3, 28, 35), (3, 35, 37),
    ]  # fmt: skip
    assert (length == stop - position).all()
    assert (token == start[row] + position - context[row]).all()
    assert [(s.first, s.count, s.longest, s.update) for s in plan.steps] == [
        (0, 3, 14, True), (3, 2, 7, True), (5, 2, 7, True), (7, 2, 7, True), (9, 1, 2, False)
    ]  # fmt: skip
    yield "pieces end at the update points"


def warm():
    """Start-up launches all variants, once for layers that are alike, and touches no page."""
    config = config_of(sparse_cache_size=200, update_interval=5)
    problem = make_problem(1, config, group=3, dtype=torch.float32)
    layout, weights = problem.layout(), problem.weights()
    pages, views = poisoned_pool(layout, 3)
    decode.num_processors = lambda device: 132
    launched = []
    plain = {"attend": decode.attend, "prefill": prefill.prefill}
    for module, name in ((decode, "attend"), (prefill, "prefill")):

        def counted(*args, name=name):
            launched.append((name, args[-1]))
            plain[name](*args)

        setattr(module, name, counted)
    most = decode.choose_splits(layout, 1, pages.device)
    assert most > 2
    for _ in range(2):
        warmup.warm_up(weights, layout, views, problem.q.shape[1])
    found = [last for name, last in launched if name == "attend"]
    rows = range(1, 300)
    assert set(found) == {decode.choose_splits(layout, n, pages.device) for n in rows}
    assert len(found) == most.bit_length() and len(launched) == len(found) + 1
    assert (pages == 0xFF).all()
    yield f"{len(launched)} launches, no page touched"
    warmup.warm_up(dataclasses.replace(weights, subtract_max=True), layout, views, 6)
    assert len(launched) == 2 * len(found) + 2 and (pages == 0xFF).all()
    yield "the other mixing is compiled as well"


GROUPS = {
    g.__name__: g
    for g in (lengths, each_token, heads, splits, sizes, batch, live, hard, long, arguments, warm)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    count = 0
    for line in GROUPS[sys.argv[1]]():
        print(line, flush=True)
        count += 1
    print(f"{count} checks")
    if XFORMERS:
        print(f"{len(xformers_standin.calls)} calls")
