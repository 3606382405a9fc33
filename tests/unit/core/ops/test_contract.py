"""`LayerState.bind`: what fits is bound, and what does not is named."""

from dataclasses import replace

import pytest
import torch

from lola_vllm.core.config import LolaConfig
from lola_vllm.core.ops import LayerState
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import TABLE_FIELDS, LayerLayout
from tests.support.problem import make_problem

CONFIG = LolaConfig(window_size=8, sparse_cache_size=5, update_interval=4)


def parts(dtype=torch.bfloat16, **heads):
    """Weights, layout and pages that fit each other."""
    problem = make_problem(1, CONFIG, F=6, dtype=dtype, **{"Hs": 6, **heads})
    return problem.weights(), LayerLayout((problem.layout(),)), problem.state().pages


def other_page(layout, **fields):
    """The layout with a page that differs in these fields."""
    return LayerLayout((replace(layout.pages[0], **fields),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_fits_is_bound(dtype):
    weights, layout, pages = parts(dtype)
    wide = torch.zeros(len(pages), layout.page_bytes + 64, dtype=torch.int8)
    for memory in (pages, wide):
        state = LayerState.bind(weights, layout, memory)
        assert state.weights.num_heads == 6 and state.schedule is None
        (group,), (page,) = state.groups, layout.pages
        group.views.exact_k[1] = 1
        assert (page.views(memory).exact_k[1] == 1).all()
        table = dict(zip(TABLE_FIELDS, state.table[0].tolist(), strict=True))
        assert table["num_heads"] == 6 and table["page_bytes"] == layout.page_bytes
        assert table["exact_k"] == page.offsets["exact_k"]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("feature_map_q", lambda w: w[:, :, 1:], r"shape \[6, 16, 5\], expected \[6, 16, 6\]"),
        ("feature_map_q", lambda w: w[:3], r"shape \[3, 16, 6\], expected \[6, 16, 6\]"),
        ("key_maps", lambda w: w[:, :2], r"shape \[1, 2, 16, 6\], expected \[1, 6, 16, 6\]"),
        ("log_gate", lambda w: w[:, None], r"shape \[6, 1\], expected \[6\]"),
        ("feature_map_q", lambda w: w.mT.contiguous().mT, "and contiguous"),
        ("key_maps", lambda w: w.to("meta"), "on meta, the pages on cpu"),
    ],
)
def test_a_weight_that_does_not_fit_is_named(name, change, words):
    weights, layout, pages = parts()
    bad = replace(weights, **{name: change(getattr(weights, name))})
    with pytest.raises(ValueError, match=f"^{name}: .*{words}"):
        LayerState.bind(bad, layout, pages)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w[:0], "none given, but the layout has has_score_weights = True"),
        (lambda w: w[:, 1:].contiguous(), r"shape \[2, 24\], expected \[2, 25\]"),
        (lambda w: w.to("meta"), "on meta, the pages on cpu"),
    ],
)
def test_an_importance_that_does_not_fit_is_named(change, words):
    problem = make_problem(1, CONFIG, F=6, importance=True, dtype=torch.bfloat16)
    layout = LayerLayout((problem.layout(),))
    weights, pages = problem.weights(), problem.state().pages
    assert LayerState.bind(weights, layout, pages).weights.importance is weights.importance
    with pytest.raises(ValueError, match=f"^importance: .*{words}"):
        LayerState.bind(replace(weights, importance=change(weights.importance)), layout, pages)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("cos", lambda x: x[:5], r"shape \[8\], expected at most 8 angles"),  # sin is compared
        ("sin", lambda x: x.bfloat16(), r"must be torch.float32 on cpu, is torch.bfloat16 on cpu"),
        ("cos", lambda x: x.to("meta"), r"must be torch.float32 on cpu, is torch.float32 on meta"),
    ],
)
def test_a_rotation_that_does_not_fit_is_named(name, change, words):
    weights, layout, pages = parts()
    angles = torch.arange(8.0)
    rotation = KeyRotation(ShiftSchedule(32, 8), angles.cos(), angles.sin())
    weights = replace(weights, rotation=rotation, importance=torch.zeros(2, 25))
    layout = other_page(layout, has_score_weights=True)
    pages = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
    assert LayerState.bind(weights, layout, pages).schedule is rotation.schedule
    bad = replace(rotation, **{name: change(getattr(rotation, name))})
    with pytest.raises(ValueError, match=rf"^rotation.(cos|sin): {words}"):
        LayerState.bind(replace(weights, rotation=bad), layout, pages)
    nine = KeyRotation(rotation.schedule, torch.ones(9), torch.ones(9))
    with pytest.raises(ValueError, match=r"rotation.cos: shape \[9\], expected at most 8"):
        LayerState.bind(replace(weights, rotation=nine), layout, pages)


@pytest.mark.parametrize(
    "change",
    [lambda p: p[:, :-1].contiguous(), lambda p: p.view(torch.float32)],
    ids=["short", "not bytes"],
)
def test_pages_that_do_not_fit_are_named(change):
    weights, layout, pages = parts()
    with pytest.raises(ValueError, match=rf"^pages .*: need rows of at least {layout.page_bytes}"):
        LayerState.bind(weights, layout, change(pages))
