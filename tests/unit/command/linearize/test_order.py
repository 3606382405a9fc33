"""Which stage reads what an earlier one wrote, and which stages run after an interruption."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lola_vllm.command.linearize import recipe, run
from tests.unit.training.distill.test_distill import write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), max_position_embeddings=1024)


def test_training_on_is_for_the_first_calibration(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on from the first training, and the result is calibrated once more."""
    done: list[Any] = []

    def distill(
        base: Path, texts: list[str], out: Path, options: Any, *, work: Path, **more: Any
    ) -> None:
        read = {key: more[key].name for key in ("start", "calibration") if key in more}
        assert all(more[key].exists() for key in read), read
        out.mkdir()
        work.mkdir(exist_ok=True)
        done.append((out.name, work.name, read))

    def calibrate(base: Path, texts: Path, options: Any, model: Path) -> Any:
        assert model.is_dir()
        return SimpleNamespace(sizes=model.name, recent=[], importance={})

    def save(path: Path, sizes: dict[str, Any], importance: Any) -> None:
        path.write_text(sizes["sparse_cache_size"])
        done.append((path.name, sizes["sparse_cache_size"]))

    def write(model: Path, out: Path, sizes: Any, importance: Any, force: bool) -> None:
        done.append((out.name, model.name, sizes))

    monkeypatch.setattr("lola_vllm.training.distill.run.distill", distill)
    monkeypatch.setattr("lola_vllm.training.calibrate.run.calibrate", calibrate)
    monkeypatch.setattr("lola_vllm.training.calibrate.run.report", lambda found: "")
    monkeypatch.setattr("lola_vllm.models.calibration.importance_tensors", lambda found: found)
    monkeypatch.setattr("lola_vllm.models.calibration.save_calibration", save)
    monkeypatch.setattr(
        "lola_vllm.models.calibration.load_calibration", lambda path: (path.name, {})
    )
    monkeypatch.setattr("lola_vllm.models.calibration.write_calibrated", write)
    made, state = recipe.derive(base, text_bytes=10**6), run.WorkState(tmp_path, {})
    whole = run._Run(tmp_path, tmp_path, tmp_path, made, tmp_path, state, False, print, 1)
    for name, action in whole.actions().items():
        if name not in ("evaluate", "card"):
            action()
    assert done == [
        ("mapped", "training", {}),
        ("trained", "training", {}),
        ("calibration-1.safetensors", "trained"),
        (
            "trained-on",
            "training-on",
            {"start": "training", "calibration": "calibration-1.safetensors"},
        ),
        ("calibration-2.safetensors", "trained-on"),
        ("calibrated", "trained-on", "calibration-2.safetensors"),
    ]
