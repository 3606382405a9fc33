"""How the demo model's package data is made of several training runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SCRIPT = Path(__file__).parents[3] / "tools/pack_demo_model.py"
MAPS = ("feature_map_q", "window_factors")
NAMES = ("q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pack_demo_model", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adapters(seed: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 12, generator=gen), torch.randn(9, rank, generator=gen)


def test_a_mean_of_more_ranks_loses_the_smallest(script: ModuleType) -> None:
    runs = [adapters(seed) for seed in range(3)]
    A, B, lost = script.mean_adapters(runs)
    mean = sum(b @ a for a, b in runs) / 3
    missing = (B @ A - mean).square().sum() / mean.square().sum()
    assert float(missing) == pytest.approx(lost, rel=1e-3) and 0.01 < lost < 0.6
    singular = torch.linalg.svdvals(mean.double())
    assert lost == pytest.approx(float((singular[3:] ** 2).sum() / (singular**2).sum()))


def test_files(script: ModuleType, tmp_path: Path) -> None:
    for seed in (0, 1):
        A, B = adapters(seed)
        tensors = {NAMES[0]: A, NAMES[1]: B}
        tensors["feature_map_q"] = torch.full((2, 2), float(seed))
        tensors["window_factors"] = torch.full((2,), 0.1 + seed)
        (tmp_path / f"{seed}").mkdir()
        first = {name: torch.full_like(tensors[name], 9.0) for name in MAPS}  # of stage 1
        save_file(first, tmp_path / f"{seed}/maps.safetensors")
        save_file(tensors, tmp_path / f"{seed}/lora.safetensors")
    script.pack([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    maps, lora = (load_file(tmp_path / f"out/{name}.safetensors") for name in ("maps", "lora"))
    assert set(maps) == set(MAPS) and set(lora) == set(NAMES)
    assert maps["feature_map_q"].dtype == torch.bfloat16 and (maps["feature_map_q"] == 0.5).all()
    assert torch.equal(maps["window_factors"], torch.full((2,), 0.6))
    assert all(tensor.dtype == torch.bfloat16 for tensor in lora.values())
    # What was packed can be packed with others.
    script.pack([tmp_path / "out", tmp_path / "0"], tmp_path / "again")
    again = load_file(tmp_path / "again/maps.safetensors")
    assert (again["feature_map_q"] == 0.25).all()
    save_file({"other": torch.zeros(1)}, tmp_path / "1/lora.safetensors")
    with pytest.raises(SystemExit, match="other tensors"):
        script.pack([tmp_path / "0", tmp_path / "1"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_of_a_linearized_model(script: ModuleType, tmp_path: Path) -> None:
    A, B = adapters(0)
    model, work = tmp_path / "model", tmp_path / "model.training"
    for folder in (model, work / "training-on"):
        folder.mkdir(parents=True)
    save_file({name: torch.ones(2) for name in MAPS}, work / "training-on/maps.safetensors")
    save_file(dict(zip(NAMES, (A, B), strict=True)), work / "training-on/lora.safetensors")
    (model / "README.md").write_text("# Model\n\nMore.\n\n## How it was made\n\nWith care.\n")
    with pytest.raises(SystemExit, match="not finished by lola-vllm linearize"):
        script.pack_linearized(model, tmp_path / "out")
    (work / "calibration-2.safetensors").write_bytes(b"calibration")
    script.pack_linearized(model, tmp_path / "out")
    written = list((tmp_path / "out").iterdir())
    assert all(path.stat().st_size for path in written)
    names = {"maps.safetensors", "lora.safetensors", "calibration.safetensors", "CARD.md"}
    assert {path.name for path in written} == names
    assert (tmp_path / "out/CARD.md").read_text() == "## How it was made\n\nWith care.\n"
