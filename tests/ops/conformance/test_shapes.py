"""Layouts of heads, head and feature sizes, dtypes, and parts that a row's pairs are cut into."""

from itertools import product

import pytest
import torch

from lola_vllm.core.lola_config import LolaConfig
from tests.support.backends import fewer, only
from tests.support.problem import make_problem

ETA = 10
CPU = ("torch", "cpp", "cpp-threads")
# Group, maps per query head, sharing, mixing, sinks.
HEADS = list(product([1, 3, 4], [False, True], ["none", "kv_head"], ["lola", "lolcats"], [0, 4]))
COVERING = [
    (1, False, "none", "lola", 0),
    (1, True, "kv_head", "lolcats", 4),
    (3, False, "none", "lolcats", 4),
    (3, True, "none", "lola", 4),
    (3, True, "kv_head", "lola", 0),
    (4, False, "kv_head", "lola", 4),
    (4, True, "none", "lolcats", 0),
    (4, True, "kv_head", "lolcats", 4),
]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@fewer("interpreted", heads=COVERING)
def test_head_layouts_mixings_and_sinks(backend, heads):
    group, per_query_head, sharing, mixing, sink = heads
    config = LolaConfig(
        window_size=ETA, sparse_cache_size=6, update_interval=4,
        sparse_sharing=sharing, mixing=mixing, sink_size=sink,
    )  # fmt: skip
    Hs = 2 * group if per_query_head else 2
    problem = make_problem(39, config, group=group, Hs=Hs, seed=group, dtype=backend.dtype)
    decode_from = 30 if backend.prefills else 3
    backend.check(problem, [2, 5, 6, 25], decode_from=decode_from, extra_stride=192)


@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@fewer("interpreted", dtype=[torch.float32])
def test_learned_sinks(backend, parts, mixing, dtype):
    config = LolaConfig(
        window_size=ETA, sparse_cache_size=6, update_interval=4, sink_size=2, mixing=mixing
    )
    problem = make_problem(60, config, d=32, dtype=dtype, sinks=True)
    backend.cut_in(parts).check(problem, [3, 25], decode_from=31, extra_stride=192)


@pytest.mark.parametrize("Hs", [2, 3, 6, 12])
@fewer("interpreted", Hs=[])
def test_a_shared_set_of_several_states(backend, Hs):
    """CUDA: heads that a block takes at once ask different hidden states."""
    config = LolaConfig(
        window_size=ETA, sparse_cache_size=6, update_interval=4,
        sparse_sharing="kv_head",
    )  # fmt: skip
    for group in (6, 12):
        if group % Hs == 0:
            problem = make_problem(33, config, Hkv=1, group=group, Hs=Hs, d=64, dtype=backend.dtype)
            backend.check(problem, decode_from=20)


@pytest.mark.parametrize(
    "d, F, lam, window, interval",
    [(24, 20, 9, 12, 12), (40, 5, 70, 9, 17), (16, 36, 3, 70, 80), (5, 1, 2, 3, 2)],
)
def test_odd_sizes(backend, d, F, lam, window, interval):
    """No powers of two, full tiles, an interval longer than the window."""
    T = window + 2 * max(interval, lam) + 5
    config = LolaConfig(window_size=window, sparse_cache_size=lam, update_interval=interval)
    problem = make_problem(T, config, d=d, F=F, group=2, Hkv=1, dtype=backend.dtype, seed=d)
    backend.check(problem, decode_from=T - 3)


@pytest.mark.prompts
@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
def test_more_heads_and_tokens_than_a_tile(backend, mixing):
    """Triton: a tile of prefill holds 16 tokens of four query heads of the six, and the first chunk
    is longer."""
    config = LolaConfig(window_size=18, sparse_cache_size=6, update_interval=5, mixing=mixing)
    problem = make_problem(40, config, Hkv=1, group=6, d=24, dtype=backend.dtype)
    backend.check(problem, [3, 33], decode_from=40, extra_stride=192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 96, 128, 24, 5])  # whole vectors and not
@pytest.mark.parametrize("group", [1, 3, 9])  # CUDA: one head, some, more than a block takes
@fewer("interpreted", d=[])
def test_head_sizes_and_dtypes(backend, d, group, dtype):
    config = LolaConfig(window_size=40, sparse_cache_size=6, update_interval=4)
    problem = make_problem(56, config, Hkv=1, group=group, d=d, F=33, dtype=dtype, scale=0.5)
    backend.check(problem, decode_from=51)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(backend, dtype):
    """In the interpreter products cut float32 off to bfloat16, where a GPU rounds."""
    config = LolaConfig(window_size=8, sparse_cache_size=4)
    problem = make_problem(50, config, dtype=dtype, seed=1)
    backend.check(problem, decode_from=30)


@only(*CPU, "triton")
@pytest.mark.parametrize("d", [8, 16, 24, 64, 80])
@pytest.mark.parametrize("group", [1, 3, 5])
def test_bfloat16_prompts(backend, d, group):
    """With avx512_bf16, heads of whole vectors are multiplied as bfloat16."""
    config = LolaConfig(window_size=37, sparse_cache_size=53, sink_size=3)
    problem = make_problem(260, config, group=group, d=d, dtype=torch.bfloat16, scale=2.0)
    for cuts in ([], [1, 38, 39, 150]):
        backend.check(problem, cuts)


@only(*CPU)
def test_bfloat16_prompts_are_rounded_once(backend):
    """Answers are the reference's rounded to bfloat16, but for those that lie between two values.

    Softmax weights of 8 bits would make one in seven another.
    """
    config = LolaConfig(window_size=64, sparse_cache_size=64)
    problem = make_problem(300, config, group=3, d=64, F=16, dtype=torch.bfloat16)
    out, _ = backend.run(problem)
    expected, _ = problem.reference()
    assert (out != expected.to(torch.bfloat16)).float().mean() < 0.03


@only(*CPU, "triton")
@pytest.mark.parametrize("d", [16, 20, 32, 64, 96])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
def test_bfloat16_decode(backend, d, group):
    """With avx512_bf16, logits of heads of whole vectors are products of bfloat16."""
    config = LolaConfig(window_size=13, sparse_cache_size=11, update_interval=5, sink_size=3)
    problem = make_problem(70, config, group=group, d=d, dtype=torch.bfloat16, scale=2.0)
    backend.check(problem, decode_from=9)


@pytest.mark.parametrize("mixing", ["lola", "lolcats"])
@pytest.mark.parametrize("F", [1, 40, 70, 130])
@pytest.mark.parametrize("parts", [1, 2, 4, 64])
@fewer("interpreted", F=[40])
def test_feature_sizes_and_parts(backend, F, parts, mixing):
    """Keys and rows of H are split among processors, and the parts merged."""
    config = LolaConfig(
        window_size=150, sparse_cache_size=70, update_interval=50, sink_size=3,
        mixing=mixing,
    )  # fmt: skip
    problem = make_problem(301, config, Hkv=1, group=2, d=64, F=F, dtype=backend.dtype, scale=0.5)
    backend.cut_in(parts).check(problem, decode_from=298)


@pytest.mark.parametrize("parts", [1, 4, 64])
@fewer("interpreted", parts=[])
def test_an_almost_empty_page_is_split(backend, parts):
    config = LolaConfig(window_size=300, sparse_cache_size=70, update_interval=5)
    problem = make_problem(3, config, d=64, F=16, dtype=torch.bfloat16)
    backend.cut_in(parts).check(problem, decode_from=0)
