"""Wrong arguments of an op raise, and the message begins with the argument's name.

`LayerState.bind` checks weights and pages (tests/unit/core/ops/test_contract.py).
"""

from dataclasses import replace

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import DecodeBatch, PrefillBatch
from lola_vllm.core.state import LayerLayout
from tests.support.backends import only
from tests.support.problem import make_problem

COMPILED = ("cpp", "cuda-emulated", "cuda")  # C++ and CUDA
CHECKING = (*COMPILED, "triton", "triton-interpreted")


def uncontiguous(x):
    """The same values; the last dimension has a stride."""
    return x.mT.contiguous().mT


# Each changes one of the arguments of both ops, given by name.
BAD = {
    "q: shape": lambda a: {"q": a["q"][:, :1]},
    "k: shape": lambda a: {"k": a["k"][:, :1]},
    "v: shape": lambda a: {"v": a["v"][:1]},
    "out: shape": lambda a: {"out": a["out"][..., :1]},
    "q: the last": lambda a: {"q": uncontiguous(a["q"])},
    "v: the last": lambda a: {"v": uncontiguous(a["v"])},
    "out: the last": lambda a: {"out": uncontiguous(a["out"])},
    "k: dtype": lambda a: {"k": a["k"].double()},
    "v: dtype": lambda a: {"v": a["v"].double()},
}
BAD_BATCH = {
    "state_indices: ": lambda b: b._replace(state_indices=b.state_indices[:1]),
    "seq_lens: shape": lambda b: b._replace(seq_lens=b.seq_lens[:1]),
}
BAD_FOR_COMPILED = {
    "q: shape": lambda a: {"q": a["q"][0]},
    "q: dtype": lambda a: {"q": a["q"].int()},
    "out: dtype": lambda a: {"out": a["out"].int()},
    "layout: shape": lambda a: {"layer": replace(a["layer"], table=a["layer"].table[:, :-1])},
    "layout: must be int64": lambda a: {"layer": replace(a["layer"], table=a["layer"].table.int())},
    "layout: keys and values": lambda a: {"layer": unknown_dtype(a["layer"])},
    "pages: shape": lambda a: {"layer": replace(a["layer"], pages=a["layer"].pages[0])},
    "pages: rows": lambda a: {"layer": replace(a["layer"], pages=a["layer"].pages[:, :-256])},
}
BAD_BATCH_FOR_COMPILED = {
    "state_indices: dtype": lambda b: b._replace(state_indices=b.state_indices.float()),
    "seq_lens: dtype": lambda b: b._replace(seq_lens=b.seq_lens.float()),
}


def unknown_dtype(layer):
    """H and s said to be bfloat16, which no op keeps."""
    page = replace(layer.groups[0].layout, state_dtype=torch.bfloat16)
    table = LayerLayout((page,)).table(layer.weights.num_heads, False)
    return replace(layer, table=table)


@pytest.fixture
def good(backend):
    """Arguments of a decode that pass, by name."""
    config = LolaConfig(window_size=10, sparse_cache_size=6, update_interval=4)
    problem = make_problem(2, config, dtype=torch.float32).to(backend.device)
    state_indices = torch.tensor([1, 2], device=backend.device)
    q, k, v = problem.tokens(0, 2)
    arguments = {
        "layer": problem.state(), "q": q, "k": k, "v": v,
        "batch": DecodeBatch(state_indices, torch.ones_like(state_indices)),
        "out": torch.empty_like(q),
    }  # fmt: skip
    backend.decode(*arguments.values())
    return arguments


@only(*CHECKING)
@pytest.mark.parametrize("fault", BAD)
def test_a_tensor(backend, good, fault):
    bad = good | BAD[fault](good)
    with pytest.raises((RuntimeError, ValueError), match=f"^{fault}"):
        backend.decode(*bad.values())
    if backend.prefills:
        none = torch.zeros(2, dtype=torch.int64)
        bad["batch"] = PrefillBatch(good["batch"].state_indices, torch.tensor([0, 1, 2]), none)
        with pytest.raises((RuntimeError, ValueError), match=f"^{fault}"):
            backend.prefill(*bad.values())


@only(*CHECKING)
@pytest.mark.parametrize("fault", BAD_BATCH)
def test_a_batch(backend, good, fault):
    with pytest.raises((RuntimeError, ValueError), match=f"^{fault}"):
        backend.decode(*(good | {"batch": BAD_BATCH[fault](good["batch"])}).values())


@only(*COMPILED)
@pytest.mark.parametrize("fault", BAD_FOR_COMPILED)
def test_a_tensor_of_a_compiled_op(backend, good, fault):
    with pytest.raises(RuntimeError, match=f"^{fault}"):
        backend.decode(*(good | BAD_FOR_COMPILED[fault](good)).values())


@only(*COMPILED)
@pytest.mark.parametrize("fault", BAD_BATCH_FOR_COMPILED)
def test_a_batch_of_a_compiled_op(backend, good, fault):
    with pytest.raises(RuntimeError, match=f"^{fault}"):
        backend.decode(*(good | {"batch": BAD_BATCH_FOR_COMPILED[fault](good["batch"])}).values())


@only("cpp")
@pytest.mark.parametrize(
    ("fault", "batch"),
    [
        ("state_indices: entry 1 is 4, but there are 4 pages", DecodeBatch([1, 4], [1, 1])),
        ("seq_lens: entry 0 is 0", DecodeBatch([1, 2], [0, 1])),
        ("query_start_loc: entries 1 and 2", PrefillBatch([1, 2], [0, 2, 3], [0, 0])),
        ("query_start_loc: entries 0 and 1", PrefillBatch([1, 2], [1, 0, 2], [0, 0])),
        ("query_start_loc: shape", PrefillBatch([1, 2], [0, 2], [0, 0])),
        ("context_lens: entry 1 is -1", PrefillBatch([1, 2], [0, 1, 2], [0, -1])),
        ("context_lens: shape", PrefillBatch([1, 2], [0, 1, 2], [0])),
    ],
)
def test_a_number(backend, good, fault, batch):
    op = backend.decode if isinstance(batch, DecodeBatch) else backend.prefill
    with pytest.raises(RuntimeError, match=f"^{fault}"):
        op(*(good | {"batch": type(batch)(*map(torch.tensor, batch))}).values())


@only("triton", "triton-interpreted")
@pytest.mark.parametrize("name", ["query_start_loc", "context_lens"])
def test_a_count_of_a_prompt(backend, good, name):
    starts, none = torch.tensor([0, 1, 2]), torch.zeros(2, dtype=torch.int64)
    batch = PrefillBatch(good["batch"].state_indices, starts, none)
    short = batch._replace(**{name: getattr(batch, name)[:1]})
    with pytest.raises(ValueError, match=f"^{name}: shape"):
        backend.prefill(*(good | {"batch": short}).values())


@only("cuda-emulated", "cuda")
def test_a_head_that_is_too_large(backend):
    config = LolaConfig(window_size=10, sparse_cache_size=6)
    problem = make_problem(1, config, d=640, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"^q: head size 640"):
        backend.run(problem, decode_from=0)
