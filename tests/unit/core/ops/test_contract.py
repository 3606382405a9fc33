"""`LayerState.bind`: what fits is bound, and what does not is named."""

from dataclasses import replace

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import LayerState
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import TABLE_FIELDS, LayerLayout
from tests.support.problem import make_problem

CONFIG = LolaConfig(window_size=8, sparse_cache_size=5, update_interval=4)
SCHEDULE = ShiftSchedule(32, 8)


def parts(dtype=torch.bfloat16, **options):
    """Weights, layout and pages that fit each other."""
    problem = make_problem(1, CONFIG, F=6, Hs=6, dtype=dtype, **options)
    return problem.weights(), LayerLayout((problem.layout(),)), problem.state().pages


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
        ("gates", lambda w: w[:, 0], r"shape \[6\], expected \[6, 2\]"),
        ("feature_map_q", lambda w: w.mT.contiguous().mT, "and contiguous"),
        ("key_maps", lambda w: w.to("meta"), "on meta, the pages on cpu"),
        ("importance", lambda w: w[:0], "none given, but the layout has has_score_weights = True"),
        ("importance", lambda w: w[:, 1:].contiguous(), r"shape \[2, 24\], expected \[2, 25\]"),
        ("importance", lambda w: w.to("meta"), "on meta, the pages on cpu"),
        # The sines are compared with the cosines.
        ("rotation", lambda r: replace(r, cos=r.cos[:5]), r"shape \[8\], expected at most 8 angl"),
        ("rotation", lambda r: replace(r, sin=r.sin.bfloat16()), "must be torch.float32 on cpu, i"),
        ("rotation", lambda r: replace(r, cos=r.cos.to("meta")), "is torch.float32 on meta"),
        (
            "rotation",
            lambda r: KeyRotation(SCHEDULE, torch.ones(9), torch.ones(9)),
            r"shape \[9\], expected at most 8",
        ),
        ("pages", lambda p: p[:, :-1].contiguous(), "need rows of at least PAGE_BYTES"),
        ("pages", lambda p: p.view(torch.float32), "need rows of at least PAGE_BYTES"),
    ],
)
def test_what_does_not_fit_is_named(name, change, words):
    weights, layout, pages = parts(importance=True, schedule=SCHEDULE)
    bound = LayerState.bind(weights, layout, pages)
    assert bound.weights.importance is weights.importance and bound.schedule is SCHEDULE
    if name == "pages":
        pages = change(pages)
    else:
        weights = replace(weights, **{name: change(getattr(weights, name))})
    words = words.replace("PAGE_BYTES", str(layout.page_bytes))
    with pytest.raises(ValueError, match=rf"^{name}.*: .*{words}"):
        LayerState.bind(weights, layout, pages)
