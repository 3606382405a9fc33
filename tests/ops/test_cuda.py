"""The CUDA decode and update against the reference: on a GPU, and emulated where there is none.

"cuda" runs `lola::decode` of the extension on the device. "emulated" compiles the same sources as
plain C++ (csrc/cuda/emulate.h) and runs blocks, warps and barriers on the CPU: it covers the
arithmetic, the indexing, the launch geometry and missing barriers, but no hardware.
"""

from dataclasses import replace

import pytest
import torch
from cuda_problem import TOLERANCE, check, decode, pool, run, to_device
from problem import (
    assert_state_matches,
    assert_unrecallable_stay,
    full_attention,
    make_problem,
    unrecallable,
)

from lola_vllm.config import LolaConfig
from lola_vllm.ops import native, portable

ETA = 10
DTYPES = list(TOLERANCE)
ON_GPU = pytest.mark.gpu


@pytest.mark.parametrize("interval", [1, 7, ETA])
@pytest.mark.parametrize("lam", [0, 1, 5, 100])
@pytest.mark.parametrize("T", [1, ETA, ETA + 1, 41])
def test_decode_equals_the_reference(device, T, lam, interval):
    config = LolaConfig(
        window_size=ETA, sparse_cache_size=lam, update_interval=interval, feature_dim=8
    )
    problem = make_problem(T, config, dtype=torch.float32, seed=T + lam)
    check(problem, device)
    check(problem, device, decode_from=T // 2)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("sharing", ["none", "kv_head"])
@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
@pytest.mark.parametrize("sink", [0, 4])
def test_head_layouts_mixings_and_sinks(device, group, per_query_head, sharing, mixing, sink):
    config = LolaConfig(
        window_size=ETA, sparse_cache_size=6, update_interval=4, feature_dim=8,
        sparse_sharing=sharing, mixing=mixing, sink_size=sink,
    )  # fmt: skip
    Hs = 2 * group if per_query_head else 2
    problem = make_problem(37, config, group=group, Hs=Hs, seed=group, dtype=torch.float32)
    check(problem, device, decode_from=3, extra_stride=192)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 96, 128, 24, 5])  # whole vectors and not
@pytest.mark.parametrize("group", [1, 3, 9])  # one head, some, more than a block takes at once
def test_head_sizes_and_dtypes(device, d, group, dtype):
    config = LolaConfig(window_size=40, sparse_cache_size=6, update_interval=4, feature_dim=33)
    problem = make_problem(56, config, Hkv=1, group=group, d=d, dtype=dtype, scale=0.5)
    check(problem, device, decode_from=51)


@pytest.mark.parametrize("Hs", [2, 3, 6, 12])
def test_a_shared_set_of_several_states(device, Hs):
    """Heads that a block takes at once ask different hidden states."""
    config = LolaConfig(
        window_size=ETA, sparse_cache_size=6, update_interval=4, feature_dim=8,
        sparse_sharing="kv_head",
    )  # fmt: skip
    for group in (6, 12):
        if group % Hs == 0:
            problem = make_problem(33, config, Hkv=1, group=group, Hs=Hs, d=64, dtype=torch.float32)
            check(problem, device, decode_from=20)


@pytest.mark.parametrize("F", [1, 40, 70, 130])
@pytest.mark.parametrize("processors", [1, 4, 64])
def test_feature_sizes_and_splits(device, F, processors, monkeypatch):
    """More processors than blocks: keys and rows of H are split, and the parts merged."""
    monkeypatch.setenv("LOLA_EMULATED_PROCESSORS", str(processors))
    config = LolaConfig(
        window_size=150, sparse_cache_size=70, update_interval=50, feature_dim=F, sink_size=3
    )
    problem = make_problem(301, config, Hkv=1, group=4, d=64, dtype=torch.float32, scale=0.5)
    check(problem, device, decode_from=298)


@pytest.mark.parametrize("processors", [1, 64])
def test_an_almost_empty_page_is_split(device, processors, monkeypatch):
    monkeypatch.setenv("LOLA_EMULATED_PROCESSORS", str(processors))
    config = LolaConfig(window_size=300, sparse_cache_size=70, update_interval=5, feature_dim=16)
    problem = make_problem(3, config, d=64, dtype=torch.bfloat16)
    check(problem, device)


@pytest.mark.parametrize("processors", [1, 8])
@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
def test_rows_are_independent_and_padding_touches_nothing(device, wide, processors, monkeypatch):
    monkeypatch.setenv("LOLA_EMULATED_PROCESSORS", str(processors))
    config = LolaConfig(
        window_size=60, sparse_cache_size=5, update_interval=7, feature_dim=8, sink_size=2
    )
    counts = [1, 4, 9, 66, 76]
    problems = [
        replace(
            to_device(make_problem(n + 3, config, seed=n, d=64, dtype=torch.float32), device),
            **{
                name: getattr(
                    to_device(make_problem(1, config, d=64, dtype=torch.float32), device), name
                )
                for name in ("feature_map_q", "feature_map_k", "window_factors")
            },
        )
        for n in counts
    ]
    layout, weights = problems[0].layout(), problems[0].weights()
    pages, views = pool(layout, 8, device)
    slots = torch.tensor([3, 0, 7, 5, 4], dtype=wide, device=device)  # row 1 is padding
    live = (0, 2, 3, 4)
    for i in live:
        p, n = problems[i], counts[i]
        portable.prefill(
            p.q[:n], p.k[:n], p.v[:n], weights, layout, views, slots[i : i + 1],
            torch.tensor([0, n]), torch.tensor([0]), torch.empty_like(p.q[:n]),
        )  # fmt: skip
    for step in range(3):
        q, k, v = (
            torch.stack([getattr(p, x)[n + step] for p, n in zip(problems, counts, strict=True)])
            for x in "qkv"
        )
        seq_lens = torch.tensor(counts, device=device, dtype=wide) + step + 1
        seq_lens[1] = 14 * step  # a count means nothing without a page, due for an update or not
        out = torch.full_like(q, torch.nan)
        decode(q, k, v, weights, layout, views, slots, seq_lens, out)
        assert (out[1] == 0).all()
        for i in live:
            expected = problems[i].reference()[0][counts[i] + step]
            torch.testing.assert_close(out[i].double(), expected, rtol=1e-4, atol=1e-4)
    cpu_pages = pages.cpu()
    for i in live:
        assert_state_matches(
            to_device(problems[i], "cpu"), layout, layout.views(cpu_pages), int(slots[i]),
            counts[i] + 3, rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    for page in (0, 1, 2, 6):
        assert (cpu_pages[page] == 0xFF).all()


@pytest.mark.parametrize("processors", [1, 64])
def test_a_slot_beyond_the_pool_touches_nothing(device, processors, monkeypatch):
    monkeypatch.setenv("LOLA_EMULATED_PROCESSORS", str(processors))
    config = LolaConfig(window_size=200, sparse_cache_size=5, update_interval=1, feature_dim=8)
    problem = to_device(make_problem(2, config, d=64, dtype=torch.float32), device)
    layout = problem.layout()
    pages, views = pool(layout, 3, device)
    out = torch.zeros_like(problem.q)
    slots, lengths = (torch.tensor(x, device=device) for x in ([3, 2**33], [1, 1]))
    decode(problem.q, problem.k, problem.v, problem.weights(), layout, views, slots, lengths, out)
    assert out.isnan().all()
    assert (pages == 0xFF).all()


@pytest.mark.parametrize("processors", [1, 64])
def test_more_candidates_than_shared_memory_holds(device, processors, monkeypatch):
    """The lists of an update that long lie in memory, one per row and set."""
    monkeypatch.setenv("LOLA_EMULATED_PROCESSORS", str(processors))
    config = LolaConfig(window_size=5, sparse_cache_size=20, update_interval=1700, feature_dim=4)
    problem = make_problem(1701, config, group=2, d=4, dtype=torch.float32)
    check(problem, device, decode_from=1698)


@pytest.mark.parametrize("lam", [0, 100])
def test_a_window_or_cache_that_holds_everything_is_full_attention(device, lam):
    config = LolaConfig(window_size=5 if lam else 50, sparse_cache_size=lam, feature_dim=8)
    problem = make_problem(40, config, dtype=torch.float32, d=64)
    out, *_ = run(problem, device)
    torch.testing.assert_close(out.double(), full_attention(problem), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
def test_extreme_logits_stay_finite(device, mixing):
    config = LolaConfig(
        window_size=ETA, sparse_cache_size=5, update_interval=3, feature_dim=8, mixing=mixing
    )
    problem = make_problem(50, config, dtype=torch.float32, scale=6.0)
    logits = torch.einsum("qhd,khd->hqk", problem.q[:, ::3], problem.k) / 4
    assert logits.abs().max() > 100
    out, *_ = run(problem, device, decode_from=20)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), problem.reference()[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sharing", ["none", "kv_head"])
@pytest.mark.parametrize(
    "interval, T, newest, kept",
    [(40, 41, 1, [0, 1, 2]), (1, 8, 1, [0, 1, 2]), (1, 8, 2, [0, 1, 3])],
)
def test_ties_keep_the_older_pair(device, sharing, interval, T, newest, kept):
    """Equal values have exactly equal errors against an empty state."""
    config = LolaConfig(
        window_size=4, sparse_cache_size=3, update_interval=interval, feature_dim=8,
        sparse_sharing=sharing,
    )  # fmt: skip
    problem = make_problem(T, config, dtype=torch.float32, Hs=6)
    problem.v[:] = problem.v[0]
    problem.v[3] *= newest
    if sharing == "kv_head":  # errors are relative, and tie whatever the values
        kept = [0, 1, 2]
    _, layout, views = run(problem, device)
    positions = views.positions[2].sort(-1).values.tolist()
    assert positions == [kept] * layout.num_sparse_heads
    assert_state_matches(problem, layout, views, 2, T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interval", [1, 8])
def test_nan_scores_never_fill_more_than_the_cache(device, interval):
    config = LolaConfig(window_size=4, sparse_cache_size=3, update_interval=interval, feature_dim=8)
    problem = make_problem(25, config, dtype=torch.float32)
    problem.v[2:20] = torch.nan
    _, layout, views = run(problem, device)
    assert all(len(set(row)) == 3 for row in views.positions[2].tolist())
    folded = float(layout.num_folded(torch.tensor(25)))
    torch.testing.assert_close(views.s[2].sum(-1), torch.full((2,), 2 * folded))


@pytest.mark.parametrize("interval", [1, 5, 9])
@pytest.mark.parametrize("sharing", ["none", "kv_head"])
def test_scores_that_are_no_numbers_count_as_the_largest(device, interval, sharing):
    problem = unrecallable(interval, sharing, torch.float32)
    _, layout, views = run(problem, device)
    assert_unrecallable_stay(problem, layout, views, 2)


def test_inputs_may_be_strided_and_unaligned(device):
    """q, k and v of vLLM are slices of one projection; the output is a slice too."""
    config = LolaConfig(window_size=ETA, sparse_cache_size=6, update_interval=4, feature_dim=8)
    problem = make_problem(40, config, d=64, dtype=torch.bfloat16)
    expected, *_ = run(problem, device, decode_from=20)
    Hq, Hkv = problem.q.shape[1], problem.k.shape[1]
    for offset in (0, 1):  # whole vectors, and not
        fused = torch.full((40, (Hq + 2 * Hkv) * 64 + offset), torch.nan, dtype=torch.bfloat16)
        rows = fused[:, offset:].unflatten(1, (-1, 64))
        parts = rows.split([Hq, Hkv, Hkv], dim=1)
        for part, x in zip(parts, (problem.q, problem.k, problem.v), strict=True):
            part.copy_(x)
        fused = fused.to(device)
        rows = fused[:, offset:].unflatten(1, (-1, 64))
        q, k, v = rows.split([Hq, Hkv, Hkv], dim=1)
        out, *_ = run(replace(problem, q=q, k=k, v=v), device, decode_from=20)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


BAD = {
    "q: shape": lambda a: {"q": a["q"][0]},
    "k: dtype": lambda a: {"k": a["k"].double()},
    "k: keys and values": lambda a: {"v": a["v"].half()},
    "H: shape": lambda a: {"H": a["H"][:, :, 1:]},
    "H: dtype": lambda a: {"H": a["H"].bfloat16(), "s": a["s"].bfloat16()},
    "s: dtype": lambda a: {"s": a["s"].bfloat16()},
    "feature_map_k: must be": lambda a: {"feature_map_k": a["feature_map_k"].bfloat16()},
    "positions: must be": lambda a: {"positions": a["positions"].long()},
    "bounds: shape": lambda a: {"bounds": a["bounds"].new_empty(3, 2, 6, 6)},
    "directions: must be": lambda a: {"directions": a["directions"].short()},
    "slots: dtype": lambda a: {"slots": a["slots"].float()},
    "slots: shape": lambda a: {"slots": a["slots"][:1]},
    "seq_lens: shape": lambda a: {"seq_lens": a["seq_lens"][:1]},
    "out: the last": lambda a: {"out": a["out"].mT.contiguous().mT},
    "q: head size": lambda a: {
        name: torch.cat([a[name]] * 40, dim=1 if name.startswith("feature") else -1)
        for name in ("q", "k", "v", "out", "H", "sparse_k", "sparse_v", "exact_k", "exact_v",
                     "feature_map_q", "feature_map_k")
    },
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_arguments_are_named(device, fault):
    config = LolaConfig(window_size=ETA, sparse_cache_size=6, update_interval=4, feature_dim=8)
    problem = to_device(make_problem(2, config, dtype=torch.float32), device)
    layout, weights = problem.layout(), problem.weights()
    _, views = pool(layout, 3, device)
    args = {
        "q": problem.q, "k": problem.k, "v": problem.v, "feature_map_q": weights.feature_map_q,
        "feature_map_k": weights.feature_map_k, "log_gate": weights.log_gate, **views._asdict(),
        "slots": torch.tensor([1, 2], device=device),
        "seq_lens": torch.tensor([1, 1], device=device), "out": torch.empty_like(problem.q),
    }  # fmt: skip
    op = torch.ops.lola.decode if device.type == "cuda" else torch.ops.lola_emulated.decode
    with pytest.raises(RuntimeError, match=f"^{fault}"):
        op(*{**args, **BAD[fault](args)}.values(), False, ETA, 4, 0)


@ON_GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_captured_graph_replays_updates_without_waiting():
    """One graph serves steps that update and steps that do not, and no launch synchronizes."""
    if not native.load():
        pytest.skip("the extension is not built")
    config = LolaConfig(window_size=ETA, sparse_cache_size=6, update_interval=4, feature_dim=8)
    problem = make_problem(60, config, d=64, dtype=torch.bfloat16)
    expected, layout, expected_views = run(problem, torch.device("cuda"))
    gpu = to_device(problem, "cuda")
    weights = gpu.weights()
    pages, views = pool(layout, 4, "cuda")
    q, k, v, out = (torch.zeros_like(x[:1]) for x in (gpu.q, gpu.k, gpu.v, gpu.q))
    slots = torch.zeros(1, dtype=torch.int32, device="cuda")  # padding while warming up
    seq_lens = torch.zeros(1, dtype=torch.int32, device="cuda")
    decode(q, k, v, weights, layout, views, slots, seq_lens, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            decode(q, k, v, weights, layout, views, slots, seq_lens, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    slots.fill_(2)
    for t in range(60):
        for target, source in ((q, gpu.q), (k, gpu.k), (v, gpu.v)):
            target.copy_(source[t : t + 1])
        seq_lens.fill_(t + 1)
        graph.replay()
        assert torch.equal(out[0].cpu(), expected[t])
    for name in ("H", "s", "positions"):
        replayed = getattr(layout.views(pages.cpu()), name)[2]
        assert torch.equal(replayed, getattr(expected_views, name)[2])
