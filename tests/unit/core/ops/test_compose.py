"""Composed states against a composition in lists, from states of the reference in float64."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import portable
from lola_vllm.core.ops.compose import ComposeError, Composer, Composition
from lola_vllm.core.ops.int8 import rounded
from lola_vllm.core.ops.reference import LolaState, feature_map, pair_importance, self_recall_error
from lola_vllm.core.ops.rope_table import RopeTable
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import LayerLayout
from tests.support.problem import STATE_INDEX, Problem, make_problem, run

D = 16  # of a head
SHIFTS = ShiftSchedule(64, 16, 3.0, 2, fold_rotation=2, bucket_start=24)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def rope(length: int = 4096, dtype: torch.dtype = torch.float64) -> RopeTable:
    """Of `make_problem`'s angles."""
    angles = torch.arange(length).double()[:, None] * 10.0 ** -torch.arange(D // 2).double()
    return RopeTable.of_rows(angles.cos().to(dtype), angles.sin().to(dtype))


def rotated(k: Tensor, by: int) -> Tensor:
    """Keys `[..., D]` as complex numbers, turned by so many positions."""
    turn = torch.polar(torch.ones(D // 2).double(), by * 10.0 ** -torch.arange(D // 2).double())
    pairs = torch.complex(k[..., : D // 2].contiguous(), k[..., D // 2 :].contiguous()) * turn
    return torch.cat([pairs.real, pairs.imag], -1)


def documents(lengths: list[int], config: LolaConfig, **options: Any) -> list[Problem]:
    """A problem for each document, all of one layer."""
    found = [make_problem(n, config, seed=i, **options) for i, n in enumerate(lengths)]
    return [problem.of_layer(found[0]) for problem in found]


def composer(problem: Problem, length: int = 4096) -> Composer:
    sequence = SequenceLayout((LayerLayout((problem.layout(),)),))
    wide = torch.promote_types(problem.k.dtype, torch.float32)
    return Composer(sequence, [problem.weights()], rope(length, wide))


def compose(problems: list[Problem], ops: Any = portable) -> tuple[Tensor, int]:
    """The composed page `[page_bytes]`, and its tokens."""
    rows = [run(ops, problem)[1].pages[STATE_INDEX] for problem in problems]
    return composer(problems[0]).compose(rows, [len(problem.q) for problem in problems])


@dataclass
class Pair:
    """An exact pair: where it stands, what the page holds, and its score's weight."""

    label: int
    k: Tensor
    v: Tensor
    w: float


@dataclass
class Head:
    """One sparse set with its state heads."""

    H: list[Tensor]
    s: list[Tensor]
    sparse: list[Pair]
    window: list[Pair]
    lost: int


def by_hand(problems: list[Problem]) -> list[Head]:
    """The composition, pair by pair, of the reference's states. One list entry per sparse set."""
    config, first = problems[0].config, problems[0]
    C, sink, eta = config.update_interval, config.sink_size, config.window_size
    lengths = [len(problem.q) for problem in problems]
    offsets = [sum(n // C * C for n in lengths[:i]) for i in range(len(lengths))]
    total = offsets[-1] + lengths[-1]
    start = max(sink, total // C * C - eta)
    schedule = first.schedule
    states: list[LolaState] = [problem.reference()[1] for problem in problems]
    Hs, Hkv = len(first.feature_map_k), first.k.shape[1]
    Hg = config.num_sparse_heads(Hs, Hkv)
    found = []
    for g in range(Hg):
        heads = range(g * (Hs // Hg), (g + 1) * (Hs // Hg))
        H = [sum(state.H[h] for state in states) for h in heads]
        s = [sum(state.s[h] for state in states) for h in heads]
        window, pool = [], []
        for i, state in enumerate(states):
            h, n = heads[0], lengths[i]

            def place(p: int, i: int = i, state: LolaState = state, h: int = h, g: int = g) -> Pair:
                label = min(p + offsets[i], start - 1) if pooled(p, i) else p + offsets[i]
                by = label - p
                if schedule is not None:
                    there, here = (
                        int(schedule.exact_rope_positions(torch.tensor(x), m, sink))
                        for x, m in ((label, total), (p, lengths[i]))
                    )
                    by = there - here
                k = rotated(state.k[h, p], by) if by else state.k[h, p]
                return Pair(label, k, state.v[h, p], float(state.w[g, p]))

            def pooled(p: int, i: int, n: int = n) -> bool:
                in_place = p + offsets[i] >= start and (p < n // C * C or i == len(states) - 1)
                return not (in_place or (i == 0 and p < sink))

            for p in state.sparse_positions[h]:
                pair = place(p)
                if config.sparse_dtype == "int8" and not torch.equal(pair.k, state.k[h, p]):
                    pair.k = rounded(pair.k)
                pool.append(pair)
            for p in state.window_positions:
                pair = place(p)
                if not pooled(p, i):
                    window.append(pair)
                    continue
                if config.sparse_dtype == "int8":
                    pair.k, pair.v = rounded(pair.k), rounded(pair.v)
                pair.w = 1.0
                if first.importance is not None:
                    weights = first.importance.double()[g * Hkv // Hg]
                    pair.w = float(pair_importance(pair.k, pair.v, weights))
                pool.append(pair)
        lam = config.of_sets(Hg)[g].sparse_pairs
        room, lost = min(lam, start - sink), 0
        if len(pool) > room:
            scores = []
            for pair in pool:
                k = pair.k
                if first.rotation is not None and total > first.rotation.schedule.length:
                    k = first.rotation.rotate_for_fold(k)
                phi = [feature_map(k, first.feature_map_k[h].double()) for h in heads]
                errors = [
                    float(self_recall_error(phi[j][None], pair.v[None], H[j], s[j]))
                    for j in range(len(phi))
                ]
                error = errors[0]
                if len(errors) > 1:
                    error = sum(errors) / len(errors) / float(pair.v.norm())
                scores.append((error * pair.w, phi))
            order = sorted(range(len(pool)), key=lambda i: -scores[i][0])
            rest = order[room:]
            if start - sink > lam and config.of_sets(Hg)[g].hidden_state:
                for i in rest:
                    for j, phi in enumerate(scores[i][1]):
                        H[j] = H[j] + phi[:, None] * pool[i].v
                        s[j] = s[j] + phi
                if schedule is not None:
                    for j in range(len(H)):
                        scale = min(1.0, 2 * schedule.length / float(s[j].sum()))
                        H[j], s[j] = H[j] * scale, s[j] * scale
            else:
                lost = len(rest)
            pool = [pool[i] for i in order[:room]]
        found.append(Head(H, s, sorted(pool, key=lambda pair: pair.label), window, lost))
    return found


def assert_is(problems: list[Problem], page: Tensor, n: int, close: dict[str, float]) -> None:
    """The page holds what `by_hand` says."""
    layout = problems[0].layout()
    views = layout.views(page[None])
    count = torch.tensor(n)
    m, share = int(layout.num_sparse(count)), layout.num_state_heads // layout.num_sparse_heads
    k, v = (x[0] for x in portable.sparse_pairs(layout, views, torch.tensor([0]), m, torch.float64))
    for g, head in enumerate(by_hand(problems)):
        labels = [pair.label for pair in head.sparse]
        assert sorted(views.positions[0, g, :m].tolist()) == labels
        order = views.positions[0, g, :m].argsort(stable=True)
        if labels and len(set(labels)) == len(labels):
            expected = [torch.stack([getattr(p, x) for p in head.sparse]) for x in "kv"]
            torch.testing.assert_close(k[g, order], expected[0], **close)
            torch.testing.assert_close(v[g, order], expected[1], **close)
            if layout.has_score_weights:
                w = torch.tensor([pair.w for pair in head.sparse], dtype=torch.float64)
                torch.testing.assert_close(
                    views.score_weights[0, g, :m][order].double(), w, **close
                )
        kv = g * layout.num_kv_heads // layout.num_sparse_heads
        for pair in head.window:
            row = layout.row(torch.tensor(pair.label))
            torch.testing.assert_close(views.exact_k[0, kv, row].double(), pair.k, **close)
            torch.testing.assert_close(views.exact_v[0, kv, row].double(), pair.v, **close)
        if int(layout.num_folded(count)):
            for j in range(share):
                h = g * share + j
                torch.testing.assert_close(views.H[0, h].double(), head.H[j], **close)
                torch.testing.assert_close(views.s[0, h].double(), head.s[j], **close)


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "odd": ({"window_size": 7, "update_interval": 3, "sink_size": 2, "sparse_cache_size": 5}, {}),
    "paper": ({"update_interval": 1, "window_size": 5}, {}),
    "no-cache": ({"sparse_cache_size": 0}, {}),
    "maps-per-query-head": ({"sink_size": 3}, {"Hs": 6}),
    "shared": ({"sparse_sharing": "kv_head"}, {"Hs": 6, "importance": True}),
    "importance": ({"update_interval": 4}, {"importance": True}),
    "recent": ({"recent_size": 6, "update_interval": 4}, {"importance": True}),
    "without-H": ({"hidden_state": False, "update_interval": 4}, {"importance": True}),
    "int8": ({"sparse_dtype": "int8", "update_interval": 4, "sink_size": 1}, {"importance": True}),
    "shifted": (
        {"update_interval": 4, "sink_size": 2, "context_shift": 16},
        {"schedule": SHIFTS, "importance": True},
    ),
    "shifted-int8": (
        {"sparse_dtype": "int8", "sink_size": 2, "context_shift": 16},
        {"schedule": SHIFTS, "rotated": D},
    ),
}


@pytest.mark.parametrize("lengths", [[48, 48], [41, 53, 30], [17, 16, 16, 5]])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_composition_by_hand(name, lengths):
    fields, options = CONFIGS[name]
    config = LolaConfig(**{"window_size": 8, "sparse_cache_size": 12, **fields})
    problems = documents(lengths, config, **options)
    page, n = compose(problems)
    C = config.update_interval
    assert n == sum(x // C * C for x in lengths[:-1]) + lengths[-1]
    # Scales of int8 pairs are float32, and so is what they stand for.
    close = {"rtol": 1e-5, "atol": 1e-5} if config.sparse_dtype == "int8" else CLOSE
    assert_is(problems, page, n, close)


def test_one_document_is_itself():
    config = LolaConfig(window_size=8, sparse_cache_size=12, update_interval=4)
    (problem,) = documents([59], config)
    page = run(portable, problem)[1].pages[STATE_INDEX]
    sequence = SequenceLayout((LayerLayout((problem.layout(),)),))
    empty = torch.full_like(page, 0xFF)
    for rows, lengths in (([page], [59]), ([empty, page, empty], [0, 59, 0])):
        found, n = composer(problem).compose(rows, lengths)
        assert n == 59
        assert torch.equal(found, sequence.cleaned(page, 59))


@pytest.mark.parametrize("recent", [0, 20])
def test_nothing_folded_is_attention_to_all_pairs(recent):
    config = LolaConfig(
        window_size=8, sparse_cache_size=500, update_interval=8, sink_size=2, recent_size=recent
    )
    problems = documents([48, 64], config)
    page, n = compose(problems)
    state = problems[0].state()
    state.pages[STATE_INDEX] = page
    new = make_problem(1, config, seed=9)
    batch = portable.DecodeBatch(torch.tensor([STATE_INDEX]), torch.tensor([n + 1]))
    out = torch.empty_like(new.q)
    portable.decode(state, new.q, new.k, new.v, batch, out)
    k = torch.cat([problems[0].k, rotated(problems[1].k, 48), new.k]).repeat_interleave(3, 1)
    v = torch.cat([problem.v for problem in [*problems, new]]).repeat_interleave(3, 1)
    p = (torch.einsum("hd,thd->ht", new.q[0], k) / D**0.5).softmax(-1)
    torch.testing.assert_close(out[0], torch.einsum("ht,thd->hd", p, v))


@pytest.mark.parametrize(
    "sizes, states", [((12, 12), (1, 1)), ((20, 3), (1, 1)), ((12, 9), (0, 1))]
)
def test_a_page_per_head_gives_what_the_heads_alone_give(sizes, states):
    """So do tensor-parallel ranks, which have some of the heads each."""
    config = LolaConfig(window_size=8, sparse_cache_size=12, update_interval=4, sink_size=2)
    alone, rows = [], []
    for i, (size, state) in enumerate(zip(sizes, states, strict=True)):
        own = config.model_copy(update={"sparse_cache_size": size, "hidden_state": bool(state)})
        problems = documents([48, 64, 39], own, Hkv=2, importance=True)
        heads = [problem.of_head(i) for problem in problems]
        alone.append((heads, compose(heads)))
        rows.append([run(portable, head)[1].pages[STATE_INDEX] for head in heads])
    layer = LayerLayout(tuple(heads[0].layout() for heads, _ in alone))
    weights = documents([48], config, Hkv=2, importance=True)[0].weights()
    both = Composer(SequenceLayout((layer,)), [weights], rope())
    page, n = both.compose([torch.cat(pair) for pair in zip(*rows, strict=True)], [48, 64, 39])
    for part, (_, (expected, count)) in zip(layer.split(page), alone, strict=True):
        assert n == count
        assert torch.equal(part, expected)


def test_what_cannot_be_composed_is_refused():
    config = LolaConfig(window_size=8, sparse_cache_size=12, update_interval=8, sink_size=9)
    layout = make_problem(4, config).layout()
    with pytest.raises(ComposeError, match="no document"):
        Composition.of(layout, [])
    with pytest.raises(ComposeError, match=r"document 2 has 15 tokens.*at least 16"):
        Composition.of(layout, [16, 15, 40])
    assert Composition.of(layout, [16, 16, 1]).num_tokens == 33
    with pytest.raises(ComposeError, match=r"80 tokens together.*at most 64"):
        composer(make_problem(4, config), length=64).composition([40, 40])
