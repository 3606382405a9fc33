"""The page: parts that do not overlap, aligned, and what the token count says of them."""

import re
from pathlib import Path

import pytest
import torch

from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.state import (
    DTYPE_CODES,
    PAGE_ALIGNMENT,
    PART_ALIGNMENT,
    TABLE_FIELDS,
    LayerLayout,
    StateLayout,
)

HEADER = Path(__file__).parents[3] / "csrc" / "layout.h"


def layout(lam=5, sink=3, interval=4, kv_dtype=torch.bfloat16, importance=False, **fields):
    config = LolaConfig(
        window_size=10, sparse_cache_size=lam, update_interval=interval, sink_size=sink,
        **fields,
    )  # fmt: skip
    return StateLayout.from_config(config, 2, 6, 16, 6, kv_dtype, importance)


@pytest.mark.parametrize("lam", [0, 1, 5])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sharing", ["none", "kv_head"])
@pytest.mark.parametrize(
    "fields", [{}, {"context_shift": 4}, {"sparse_dtype": "int8"}, {"hidden_state": False}]
)
def test_parts_do_not_overlap_and_are_aligned(lam, kv_dtype, sharing, fields):
    page = layout(lam, kv_dtype=kv_dtype, sparse_sharing=sharing, **fields)
    pool = torch.zeros(3, page.page_bytes + 128, dtype=torch.uint8)
    views = page.views(pool)
    for i, view in enumerate(views):
        assert view.shape[0] == 3
        assert view.numel() == 0 or view.data_ptr() % PART_ALIGNMENT == pool.data_ptr() % 64
        view[1] = i + 1
    for i, view in enumerate(views):
        assert (view[1] == i + 1).all()
        assert (view[0] == 0).all() and (view[2] == 0).all()
    assert page.page_bytes % PAGE_ALIGNMENT == 0
    assert sum(page.part_bytes.values()) <= page.page_bytes
    assert (pool[1, page.page_bytes :] == 0).all()


def test_layers_of_a_sequence_lie_one_after_the_other():
    sizes = [5, 0, 300]
    sequence = SequenceLayout(tuple(LayerLayout((layout(lam),)) for lam in sizes))
    rows = torch.zeros(3, sequence.row_bytes + 64, dtype=torch.uint8)
    pages = sequence.pages(rows)
    for i, (page, layer) in enumerate(zip(pages, sequence.layers, strict=True)):
        assert page.shape == (3, layer.page_bytes)
        for view in layer.pages[0].views(page):
            view[1] = i + 1
    for i, page in enumerate(pages):
        assert set(page[1].unique().tolist()) > {0}
        assert all((view[1] == i + 1).all() for view in sequence.layouts[i].views(page))
    assert not rows[[0, 2]].any() and not rows[:, sequence.row_bytes :].any()
    assert sequence.row_bytes == sum(layer.page_bytes for layer in sequence.layers)
    token = 3 * 2 * 2 * 16 * 2  # three layers, keys and values, 2 KV heads, d 16, bfloat16
    assert sequence.full_kv_bytes_per_token == token
    assert sequence.break_even_tokens(2) == -(-2 * sequence.row_bytes // token)


@pytest.mark.parametrize("interval", [1, 4, 10, 13])
@pytest.mark.parametrize("sink", [0, 3, 12])
@pytest.mark.parametrize("state", [True, False])
def test_counts_follow_a_simulation(interval, sink, state):
    page = layout(sink=sink, interval=interval, hidden_state=state)
    window, gone = [], 0
    for n in range(1, 60):
        if n > sink:
            window.append(n - 1)
        evicted = len([p for p in window if p < n - 10]) if n % interval == 0 else 0
        assert bool(page.update_due(torch.tensor(n))) == (evicted > 0)
        if evicted:
            gone += evicted
            window = [p for p in window if p >= n - 10]
        at = torch.tensor(n)
        assert int(page.num_evicted(at)) == gone
        assert int(page.num_sparse(at)) == min(gone, 5)
        assert int(page.num_folded(at)) == (max(0, gone - 5) if state else 0)
        if window:
            assert int(page.window_start(at)) <= window[0]
            assert len(window) <= page.ring_size
            rows = page.row(torch.tensor(window)).tolist()
            assert len(set(rows)) == len(window)
            assert min(rows) >= sink and max(rows) < sink + page.ring_size


def test_the_table_is_the_struct_of_the_header():
    """Names and order of `PageLayout`'s fields, and what `DType` calls each dtype."""
    header = re.sub(r"//.*", "", HEADER.read_text())
    struct = re.search(r"struct PageLayout \{(.*?)LOLA_HOST_DEVICE", header, re.DOTALL)[1]
    declared = re.findall(r"\b(?:int64_t|DType)\s+([\w\s,]+);", struct)
    assert [x.strip() for names in declared for x in names.split(",")] == list(TABLE_FIELDS)
    codes = re.search(r"enum class DType : int64_t \{(.*?)\}", header)[1].split(",")
    short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16",
             torch.float64: "f64", torch.int8: "i8"}  # fmt: skip
    assert {short[dtype]: code for dtype, code in DTYPE_CODES.items()} == {
        name.strip(): code for code, name in enumerate(codes)
    }
