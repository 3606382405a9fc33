"""Stage 2: its loss against autograd, the mean of weights along a run, and rows that grow."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lola_vllm.models.files import CheckpointError
from lola_vllm.training.distill import finetune, loss
from lola_vllm.training.distill.average import RunningMean
from lola_vllm.training.distill.options import DistillOptions
from lola_vllm.training.distill.run import distill
from tests.unit.training.distill.test_distill import OPTIONS, write_base

GROWING = dataclasses.replace(
    OPTIONS,
    rows=4,
    lora_rows=9,
    lora_row_length=64,
    lora_last_row_length=128,
    rows_per_step=1,
    average=0.5,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"word {i * i % 97} river" for i in range(1000)))
    return path


@pytest.mark.parametrize(
    "share, first", [(0.0, 8), (1e-9, 7), (0.25, 6), (0.5, 4), (1.0, 0)]
)  # fmt: skip
def test_the_mean_is_of_the_last_steps(share, first):
    mean = RunningMean(share, 8)
    for step in range(8):
        mean.add(step, {"x": torch.tensor([float(step * step)])})
    counted = [step * step for step in range(first, 8)]
    got = mean.of({"x": torch.tensor([-1.0]), "y": torch.tensor([2.0])})
    wanted = sum(counted) / len(counted) if counted else -1.0
    assert got["x"].item() == pytest.approx(wanted)
    assert got["y"].item() == 2.0


def test_lengths_grow_by_doubling_with_as_many_tokens_each():
    options = DistillOptions(lora_rows=16, lora_row_length=1024, lora_last_row_length=4096)
    assert options.lora_lengths() == [(1024, 10), (2048, 4), (4096, 2)]
    assert DistillOptions(lora_rows=5, lora_row_length=64).lora_lengths() == [(64, 5)]
    same = dataclasses.replace(options, lora_last_row_length=1024)
    assert same.lora_lengths() == [(1024, 16)]


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"lora_last_row_length": 3000}, "lora_last_row_length = 3000"),
        ({"lora_last_row_length": 512}, "lora_last_row_length = 512"),
        ({"lora_last_row_length": 4096, "lora_rows": 6}, "lora_rows = 6"),
    ],
)
def test_lengths_that_cannot_be(changes, field):
    options = DistillOptions(lora_rows=16, lora_row_length=1024)
    with pytest.raises(CheckpointError, match=field):
        dataclasses.replace(options, **changes).lora_lengths()


def test_a_run_gives_the_mean_of_its_weights_also_after_an_interruption(
    base, text, tmp_path, monkeypatch
):
    """The weights of each step are looked at from outside, and averaged here."""
    seen: list[dict[str, torch.Tensor]] = []
    lengths: list[int] = []
    add, loss = RunningMean.add, finetune._loss

    def looking(self: RunningMean, step: int, tensors: dict[str, torch.Tensor]) -> None:
        seen.append({name: value.detach().float().clone() for name, value in tensors.items()})
        add(self, step, tensors)

    def measured(model: object, row: torch.Tensor, *rest: object) -> object:
        lengths.append(len(row))
        return loss(model, row, *rest)

    monkeypatch.setattr(RunningMean, "add", looking)
    monkeypatch.setattr(finetune, "_loss", measured)
    distill(base, [str(text)], tmp_path / "whole", GROWING)
    assert lengths == [64] * 6 + [128] * 3
    assert len(seen) == 9
    lora = load_file(tmp_path / "whole.training" / "lora.safetensors")
    for name, value in lora.items():
        wanted = torch.stack([step[name] for step in seen[-4:]]).mean(0)
        last = seen[-1][name]
        assert torch.allclose(value.float(), wanted, rtol=1e-2, atol=1e-4), name
        if "lora_B" in name:  # of the adapters' factors the one that starts from zero
            assert (wanted - last).norm() > (wanted - value.float()).norm(), name

    monkeypatch.setattr(finetune, "SAVE_EVERY", 1)
    monkeypatch.setattr(
        finetune, "_loss", lambda *args: _stop() if len(seen) == 9 + 7 else loss(*args)
    )
    with pytest.raises(KeyboardInterrupt):
        distill(base, [str(text)], tmp_path / "resumed", GROWING)
    monkeypatch.setattr(finetune, "_loss", loss)
    distill(base, [str(text)], tmp_path / "resumed", GROWING, resume=True)
    again = load_file(tmp_path / "resumed.training" / "lora.safetensors")
    assert all(torch.equal(lora[name], again[name]) for name in lora)


def test_gradient_checkpointing_trains_the_same(base, text, tmp_path):
    results = []
    for checkpointing in (False, True):
        options = dataclasses.replace(
            OPTIONS, rows=2, lora_rows=4, gradient_checkpointing=checkpointing
        )
        out = tmp_path / str(checkpointing)
        distill(base, [str(text)], out, options)
        results.append(load_file(out.with_name(f"{out.name}.training") / "lora.safetensors"))
    plain, twice = results
    moved = [name for name in plain if "lora_B" in name and plain[name].any()]
    assert moved
    for name in plain:
        torch.testing.assert_close(plain[name], twice[name], rtol=2e-2, atol=1e-4)


def _stop() -> None:
    raise KeyboardInterrupt


def drawn(dtype: torch.dtype, bias: bool) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(13, 101, bias=bias).to(dtype).requires_grad_(False)
    hidden, teacher = torch.randn(2, 11, 13, dtype=dtype)
    return head, hidden.requires_grad_(), teacher, torch.rand(11) + 0.5


def by_autograd(head, hidden, teacher, weights):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    said = head(hidden).to(wide).log_softmax(-1)
    wanted = head(teacher).to(wide).log_softmax(-1)
    each = nn.functional.kl_div(said, wanted, log_target=True, reduction="none").sum(-1)
    return (each * weights).sum()


@pytest.mark.parametrize("block", [1, 4, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradient_are_autograds(monkeypatch, bias, block):
    monkeypatch.setattr(loss, "LOSS_BLOCK", block)
    args = drawn(torch.float64, bias)
    hidden = args[1]
    expected = by_autograd(*args)
    (wanted,) = torch.autograd.grad(3 * expected, hidden)
    found = loss.token_loss(*args)
    (gradient,) = torch.autograd.grad(3 * found, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_a_teacher_that_says_the_same_costs_nothing():
    head, hidden, _, weights = drawn(torch.float32, False)
    found = loss.token_loss(head, hidden, hidden.detach(), weights)
    (gradient,) = torch.autograd.grad(found, hidden)
    assert found == 0 and gradient.abs().max() == 0


def test_sums_are_float32_in_bfloat16_and_under_autocast():
    head, hidden, teacher, weights = drawn(torch.bfloat16, False)
    expected = by_autograd(head, hidden, teacher, weights)
    (wanted,) = torch.autograd.grad(expected, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss.token_loss(head, hidden.float(), teacher.float(), weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, hidden)
    torch.testing.assert_close(gradient, wanted, rtol=2e-2, atol=1e-3)
