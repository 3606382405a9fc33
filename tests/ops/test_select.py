"""The choice of a back end: by device and dtype, by the environment, or an error that says why."""

import pytest
import torch

from lola_vllm.ops.select import choose_backend

pytestmark = pytest.mark.usefixtures("fresh_choice")


@pytest.mark.parametrize(
    ("wanted", "dtype", "name"),
    [
        (None, torch.bfloat16, "native"),
        (None, torch.float32, "native"),
        (None, torch.float16, "torch"),
        ("torch", torch.float32, "torch"),
        ("native", torch.float32, "native"),
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
        ("native", "cuda", "on cuda"),
        ("triton", "cpu", "on cpu"),
    ],
)
def test_impossible_wishes_are_refused(monkeypatch, wanted, device, words):
    monkeypatch.setenv("LOLA_VLLM_OPS", wanted)
    with pytest.raises(ValueError, match=words):
        choose_backend(device, torch.float32)
