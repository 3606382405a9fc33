"""The Triton self-recall errors: values in the interpreter, and ahead-of-time compilation.

Triton decides at import whether functions are interpreted, so the values are checked in a fresh
process: this file run as a script.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from sre_cases import assert_scores, make_case

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check_values() -> int:
    """Every case of this file; returns how many were compared."""
    from lola_vllm.kernels.sre import sre_scores

    sizes = [(16, 16), (64, 40), (128, 64), (5, 3)]
    compared = 0
    for dtype in (torch.float32, torch.bfloat16):
        for share in (1, 3):
            for E, B in ((1, 1), (7, 5), (33, 2), (192, 1)):
                for d, F in sizes:
                    case = make_case(B=B, share=share, E=E, d=d, F=F, dtype=dtype)
                    result = sre_scores(*case.args())
                    assert result.dtype == torch.float32
                    assert_scores(result, case)
                    compared += 1
    for case in (
        make_case(slot_dtype=torch.int32, dtype=torch.bfloat16),
        replace(make_case(dtype=torch.bfloat16), feature_map_k=make_case().feature_map_k),
    ):
        assert_scores(sre_scores(*case.args()), case)
        compared += 1

    hot = make_case(E=33, d=64, F=64, scale=30)  # logits beyond 100: 1e-5 off in float32
    assert_scores(sre_scores(*hot.args()), hot, rtol=1e-3)

    ties = make_case(E=40, with_empty=False)
    ties.k[:, :, [0, 31, 32, 39]] = ties.k[:, :, 3:4]
    ties.v[:, :, [0, 31, 32, 39]] = ties.v[:, :, 3:4]
    for empty in (False, True):
        ties.empty[:] = empty
        result = sre_scores(*ties.args())
        assert torch.equal(result[:, :, [0, 31, 32, 39]], result[:, :, 3:4].expand(-1, -1, 4))
        if empty:
            torch.testing.assert_close(result, ties.v.norm(dim=-1))

    negative = make_case(with_empty=False)
    negative.slots[1] = -1
    result = sre_scores(*negative.args())
    torch.testing.assert_close(result[1], negative.v[1].norm(dim=-1))

    assert sre_scores(*make_case().candidates(torch.arange(0)).args()).shape == (3, 2, 0)
    return compared


@pytest.mark.skipif(INTERPRETED, reason="is the inner run")
def test_values_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split()[-1] == "66"


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions do not compile")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "d", "F", "share"), [("bf16", 64, 64, 1), ("bf16", 128, 64, 3), ("fp32", 80, 40, 1)]
)
def test_compiles_ahead_of_time(capability, dtype, d, F, share, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lola_vllm.kernels.sre import constants, sre_kernel

    compile_time = constants(d, F, share)
    types = {
        "k_ptr": f"*{dtype}",
        "v_ptr": f"*{dtype}",
        "w_ptr": f"*{dtype}",
        "h_ptr": "*fp32",
        "s_ptr": "*fp32",
        "slots_ptr": "*i64",
        "empty_ptr": "*u8",
        "out_ptr": "*fp32",
        "E": "i32",
        "num_sets": "i32",
        **dict.fromkeys(compile_time, "constexpr"),
    }
    signature = {name: types.get(name, "i64") for name in sre_kernel.arg_names}  # strides: i64
    kernel = triton.compile(
        ASTSource(fn=sre_kernel, signature=signature, constexprs=compile_time),
        target=GPUTarget("cuda", capability, 32),
    )
    assert len(kernel.asm["cubin"]) > 0
    assert f"sm_{capability}" in kernel.asm["ptx"]
    assert "mma" in kernel.asm["ptx"]  # on tensor cores
    assert kernel.metadata.shared <= 99 * 1024  # fits the smallest GPUs of these families


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_bad_arguments_are_named():
    from lola_vllm.kernels.sre import sre_scores

    case = make_case()
    for name, bad in {
        "k": case.k[0],
        "v": case.v[:, :, 1:],
        "feature_map_k": case.feature_map_k[:1],
        "H": case.H[:, :, 1:],
        "s": case.s.bfloat16(),
        "slots": case.slots.float(),
        "empty": case.empty[:-1],
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: "):
            sre_scores(*replace(case, **{name: bad}).args())
    with pytest.raises(ValueError, match=r"^k: .*GPU"):
        sre_scores(*case.args())


if __name__ == "__main__":
    print(check_values())
