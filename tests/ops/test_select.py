"""The choice of a back end: by device and dtype, by the environment, or an error that says why."""

import sys

import pytest
import torch

from lola_vllm.core.ops.select import choose_backend

pytestmark = pytest.mark.usefixtures("fresh_choice")


@pytest.mark.parametrize(
    ("wanted", "dtype", "name"),
    [
        (None, torch.bfloat16, "cpp"),
        (None, torch.float32, "cpp"),
        (None, torch.float16, "torch"),
        ("torch", torch.float32, "torch"),
        ("cpp", torch.float32, "cpp"),
    ],
)
def test_choice(monkeypatch, wanted, dtype, name):
    if wanted:
        monkeypatch.setenv("LOLA_VLLM_OPS", wanted)
    assert choose_backend("cpu", dtype).name.startswith(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_gets_triton(dtype):
    assert choose_backend("cuda", dtype).name == "triton"


@pytest.mark.parametrize(
    ("wanted", "device", "words"),
    [
        ("gpu", "cpu", "'gpu': must be one of"),
        ("cuda", "cpu", "on cpu"),
        ("cpp", "cuda", "on cuda"),
        ("triton", "cpu", "on cpu"),
        ("xformers", "cpu", "on cpu"),
        ("xformers", "cuda", r"float16 and bfloat16, not torch\.float32"),
    ],
)
def test_impossible_wishes_are_refused(monkeypatch, wanted, device, words):
    monkeypatch.setenv("LOLA_VLLM_OPS", wanted)
    with pytest.raises(ValueError, match=words):
        choose_backend(device, torch.float32)


def test_with_xformers_all_but_prefill_is_triton(monkeypatch):
    pytest.importorskip("xformers")
    from lola_vllm.kernels import backend, xformers_prefill

    monkeypatch.setenv("LOLA_VLLM_OPS", "xformers")
    monkeypatch.setattr(xformers_prefill, "missing", lambda: None)
    chosen = choose_backend("cuda", torch.bfloat16)
    assert chosen.name == "xformers" and chosen.capturable
    assert chosen.decode is backend.decode
    assert chosen.prefill is xformers_prefill.prefill
    assert chosen.warm_up is xformers_prefill.warm_up


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_xformers_without_its_kernels_is_refused(monkeypatch):
    pytest.importorskip("xformers")
    monkeypatch.setenv("LOLA_VLLM_OPS", "xformers")
    with pytest.raises(ValueError, match="no CUDA kernels here; install a CUDA build of torch"):
        choose_backend("cuda", torch.bfloat16)


def test_xformers_that_is_not_installed_is_refused(monkeypatch):
    from lola_vllm import kernels

    monkeypatch.setenv("LOLA_VLLM_OPS", "xformers")
    monkeypatch.delattr(kernels, "xformers_prefill", raising=False)
    monkeypatch.delitem(sys.modules, "lola_vllm.kernels.xformers_prefill", raising=False)
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ValueError, match=r"pip install 'lola-vllm\[xformers\]'"):
        choose_backend("cuda", torch.bfloat16)
