"""The C++ self-recall errors against the reference, and what they promise beyond closeness."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from sre_cases import assert_scores, make_case

from lola_vllm.ops import native

pytestmark = pytest.mark.skipif(not native.load(), reason="the C++ extension is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SIZES = [(d, F) for d in (16, 64, 128) for F in (16, 40, 64)] + [(5, 3), (80, 1)]


def scores(case):
    return native.sre_scores(*case.args())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("E", [1, 7, 33, 192])
def test_matches_reference(dtype, share, E):
    for d, F in SIZES:
        for B in (1, 5):
            case = make_case(B=B, share=share, E=E, d=d, F=F, dtype=dtype)
            result = scores(case)
            assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_scores(result, case)


@pytest.mark.parametrize("map_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_maps_of_any_dtype(dtype, map_dtype):
    case = make_case(share=3, d=24, dtype=dtype)
    case.feature_map_k = case.feature_map_k.to(map_dtype)
    # A double map that meets float32 keys is rounded to float32 first.
    assert_scores(scores(case), case)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_slots_and_empty_may_be_strided(slot_dtype):
    case = make_case(B=4, slot_dtype=slot_dtype)
    wide = replace(
        case,
        slots=torch.stack([case.slots, torch.full_like(case.slots, 99)], dim=1)[:, 0],
        empty=torch.stack([case.empty, ~case.empty], dim=1)[:, 0],
    )
    assert wide.slots.stride(0) == 2
    assert torch.equal(scores(wide), scores(case))
    assert_scores(scores(wide), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_a_hundred(dtype):
    case = make_case(E=65, d=64, F=64, dtype=dtype, scale=30)
    logits = case.k.double()[:, 0] @ case.feature_map_k.double()[0]
    assert logits.abs().max() > 100  # saturates the softmax, underflows to the floor of 1e-12
    # In float32 a logit of 100 carries an error of 1e-5, and so do its features.
    assert_scores(scores(case), case, rtol=1e-9 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("share", [1, 3])
def test_empty_rows_read_no_page_and_no_key(share):
    case = make_case(B=4, share=share)
    case.empty[:] = True
    case.H.fill_(torch.nan)
    case.s.fill_(torch.nan)
    expected = scores(case)
    case.k.fill_(torch.nan)
    assert torch.equal(scores(case), expected)
    norms = case.v.norm(dim=-1) if share == 1 else torch.ones_like(expected)
    torch.testing.assert_close(expected, norms)


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("share", [1, 3])
def test_equal_candidates_get_equal_bits(empty, share):
    case = make_case(B=2, share=share, E=101, d=24, with_empty=False)
    case.empty[:] = empty
    twins = torch.tensor([0, 5, 6, 47, 48, 96, 100])  # tiles of six, blocks of 48, and their tails
    case.k[:, :, twins] = case.k[:, :, 3:4]
    case.v[:, :, twins] = case.v[:, :, 3:4]
    result = scores(case)
    assert torch.equal(result[:, :, twins], result[:, :, 3:4].expand(-1, -1, len(twins)))
    if not (empty and share > 1):  # there all scores are 1
        assert result[0, 0].unique().numel() == 101 - len(twins)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1, 3])
def test_bits_do_not_depend_on_company(dtype, share):
    case = make_case(B=5, share=share, E=70, d=24, dtype=dtype)
    whole = scores(case)
    for row in range(5):
        alone = case.rows(torch.tensor([row]))
        assert torch.equal(scores(alone)[0], whole[row])
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    assert torch.equal(scores(case.candidates(order)), whole[:, :, order])
    for e in (0, 47, 48, 69):
        single = case.candidates(torch.tensor([e]))
        assert torch.equal(scores(single)[..., 0], whole[..., e])


def test_bits_do_not_depend_on_threads():
    case = make_case(B=4, share=3, E=192, d=64, F=64)  # enough work to be split
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(scores(case))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_negative_slot_counts_as_empty():
    case = make_case(B=3, with_empty=False)
    expected = scores(case)
    case.slots[1] = -1
    result = scores(case)
    torch.testing.assert_close(result[1], case.v[1].norm(dim=-1))
    assert torch.equal(result[[0, 2]], expected[[0, 2]])


def test_a_nan_candidate_spoils_only_itself():
    case = make_case(B=1, E=50)
    clean = scores(case)
    case.k[0, :, 9] = torch.nan
    result = scores(case)
    assert result[0, :, 9].isnan().all()
    others = torch.arange(50) != 9
    assert torch.equal(result[:, :, others], clean[:, :, others])


def test_page_offsets_are_64_bit():
    stride = 2**31 + 64  # elements
    source = make_case(B=2, Hg=1, E=7, with_empty=False)
    try:
        room = torch.empty(stride + source.H[0].numel())
    except RuntimeError:
        pytest.skip("8 GiB of address space are not to be had")
    H = room.as_strided((2, *source.H.shape[1:]), (stride, *source.H.stride()[1:]))
    for row in range(2):
        H[row] = source.H[source.slots[row]]
    case = replace(source, H=H, s=source.s[source.slots], slots=torch.arange(2))
    assert torch.equal(scores(case), scores(source))


@pytest.mark.parametrize(("B", "E"), [(0, 5), (2, 0)])
def test_nothing_to_score(B, E):
    case = make_case(B=2, E=5)
    index = torch.arange(B)
    case = case.rows(index).candidates(torch.arange(E))
    assert scores(case).shape == (B, 2, E)


BAD = {
    "k": lambda c: {"k": c.k[0]},
    "k contiguous": lambda c: {"k": c.k.mT.contiguous().mT},
    "k half": lambda c: {"k": c.k.half()},
    "v": lambda c: {"v": c.v[:, :, 1:]},
    "v dtype": lambda c: {"v": c.v.bfloat16()},
    "feature_map_k": lambda c: {"feature_map_k": c.feature_map_k[:, 1:]},
    "feature_map_k heads": lambda c: {"feature_map_k": c.feature_map_k[:1]},
    "H": lambda c: {"H": c.H[:, :, 1:]},
    "H heads": lambda c: {"H": c.H[:, :1]},
    "H dtype": lambda c: {"H": c.H.bfloat16(), "s": c.s.bfloat16()},
    "s": lambda c: {"s": c.s[:-1]},
    "s dtype": lambda c: {"s": c.s.double()},
    "slots": lambda c: {"slots": c.slots[:-1]},
    "slots dtype": lambda c: {"slots": c.slots.float()},
    "slots range": lambda c: {"slots": torch.full_like(c.slots, c.H.shape[0])},
    "empty": lambda c: {"empty": c.empty[:-1]},
    "empty dtype": lambda c: {"empty": c.empty.int()},
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_arguments_are_named(fault):
    case = make_case()
    with pytest.raises(RuntimeError, match=rf"^{fault.split()[0]}: "):
        scores(replace(case, **BAD[fault](case)))


@pytest.mark.parametrize("isa", native.ISA_NAMES[:2])
@pytest.mark.skipif("LOLA_VLLM_CPU_ISA" in os.environ, reason="is the inner run")
def test_lower_instruction_sets(isa):
    """All of this file again on what an older machine would run."""
    if native.ISA_NAMES.index(native.cpu_isa()) < native.ISA_NAMES.index(isa):
        pytest.skip(f"this machine has no {isa}")
    env = {**os.environ, "LOLA_VLLM_CPU_ISA": isa}
    check = "from lola_vllm.ops import native; native.load(); print(native.cpu_isa())"
    chosen = subprocess.run(
        [sys.executable, "-c", check], env=env, capture_output=True, text=True, check=True
    )
    assert chosen.stdout.strip() == isa
    again = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=env,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stdout[-3000:]
    assert " passed" in again.stdout
