"""The mean of weights along a run of stage 2, and rows that grow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lola_vllm.models.files import CheckpointError
from lola_vllm.training.distill import finetune
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
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"word {i * i % 97} river" for i in range(1000)))
    return path


@pytest.mark.parametrize(
    "share, first", [(0.0, 8), (1e-9, 7), (0.25, 6), (0.5, 4), (1.0, 0)]
)  # fmt: skip
def test_the_mean_is_of_the_last_steps(share: float, first: int) -> None:
    mean = RunningMean(share, 8)
    for step in range(8):
        mean.add(step, {"x": torch.tensor([float(step * step)])})
    counted = [step * step for step in range(first, 8)]
    got = mean.of({"x": torch.tensor([-1.0]), "y": torch.tensor([2.0])})
    wanted = sum(counted) / len(counted) if counted else -1.0
    assert got["x"].item() == pytest.approx(wanted)
    assert got["y"].item() == 2.0


def test_lengths_grow_by_doubling_with_as_many_tokens_each() -> None:
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
def test_lengths_that_cannot_be(changes: dict[str, int], field: str) -> None:
    options = DistillOptions(lora_rows=16, lora_row_length=1024)
    with pytest.raises(CheckpointError, match=field):
        dataclasses.replace(options, **changes).lora_lengths()


def test_a_run_gives_the_mean_of_its_weights_also_after_an_interruption(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_gradient_checkpointing_trains_the_same(base: Path, text: Path, tmp_path: Path) -> None:
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
