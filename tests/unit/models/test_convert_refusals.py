"""`lola-vllm convert`: files that are damaged, dangerous or of another model leave no trace."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lola_vllm.core.config import LolaConfigError
from lola_vllm.models import CheckpointError
from lola_vllm.models.convert import convert_checkpoint
from tests.support.lolcats_files import (
    State,
    distill_tensors,
    listing,
    lora_tensors,
    make_base,
    one_file_tensors,
    read_tensors,
    save,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def refused(base: Path, distill: object, lora: object = None, **options) -> str:
    """The message of a conversion that must fail and leave a model at `out` as it was."""
    work = base.parent
    paths = [
        content if content is None or isinstance(content, Path) else save(work / name, content)
        for name, content in (("distill.pt", distill), ("lora.pt", lora))
    ]
    out = work / "lola"
    out.mkdir()
    (out / "config.json").write_text("the old model")
    before = listing(work)
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(base, paths[0], out, {}, paths[1], force=True, **options)
    assert listing(work) == before
    assert (out / "config.json").read_text() == "the old model"
    return str(error.value)


BASE_IS = "the base has 2 layers, 4 query heads of size 8, 2 KV heads, hidden size 24"


def test_maps_of_a_deeper_model(base: Path) -> None:
    message = refused(base, distill_tensors(layers=3))
    assert "distill.pt: does not fit the base\nunexpected (3):" in message
    assert "model.layers.2.self_attn.feature_map_q.mlp.layer" in message
    assert "it fits a model with 3 layers, 4 query heads of size 8, F 6" in message
    assert BASE_IS in message


def test_maps_of_a_shallower_model(base: Path) -> None:
    message = refused(base, distill_tensors(layers=1))
    assert "missing (3):\n  model.layers.1.self_attn.feature_map_q [4, 8, 6]" in message
    assert "it fits a model with 1 layers" in message


@pytest.mark.parametrize(
    ("sizes", "wrong", "fit"),
    [
        ({"Hq": 8, "Hs": 8}, 6, "8 query heads of size 8, F 6"),
        ({"Hs": 3}, 2, "4 query heads of size 8, F 6, 3 state heads"),
        ({"Hs": 8}, 2, "4 query heads of size 8, F 6, 8 state heads"),
        ({"d": 16}, 4, "4 query heads of size 16, F 6"),
    ],
)
def test_maps_of_other_heads(base: Path, sizes: dict[str, int], wrong: int, fit: str) -> None:
    message = refused(base, distill_tensors(**sizes))
    assert f"wrong shape ({wrong}):" in message and "expected [4, 8, 6]" in message
    assert f"it fits a model with 2 layers, {fit}" in message


def test_every_fault_is_named_and_long_lists_are_cut(base: Path) -> None:
    tensors = distill_tensors()
    del tensors["model.layers.0.self_attn.window_factors"]
    layer = "model.layers.1.self_attn.feature_map_q.mlp.layer"
    tensors[layer] = tensors[layer][..., :5]
    tensors |= {f"model.layers.0.mlp.extra{i}": torch.zeros(1) for i in range(12)}
    message = refused(base, tensors)
    assert "missing (1):\n  model.layers.0.self_attn.window_factors [4]" in message
    assert "unexpected (12):\n  model.layers.0.mlp.extra0" in message and "and 2 more" in message
    assert f"wrong shape (1):\n  {layer}: found [4, 8, 5], expected [4, 8, 6]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["distill", "lora"])
def test_values_that_are_not_finite(base: Path, value: float, where: str) -> None:
    distill, lora = distill_tensors(), lora_tensors()
    tensors = distill if where == "distill" else lora
    name = list(tensors)[1]
    tensors[name].flatten()[3] = value
    assert f"{name} holds values that are not finite" in refused(base, distill, lora)


def test_integers_are_no_maps(base: Path) -> None:
    tensors = {name: t.to(torch.int8) for name, t in distill_tensors().items()}
    assert "found torch.int8, expected floating point" in refused(base, tensors)


def test_two_names_of_one_tensor(base: Path) -> None:
    tensors = distill_tensors()
    tensors["layers.0.self_attn.window_factor"] = torch.zeros(4)
    message = refused(base, tensors)
    assert "'layers.0.self_attn.window_factor' are the same tensor" in message


@pytest.mark.parametrize(
    ("lora", "parts"),
    [
        (
            lambda: lora_tensors(rows={"q_proj": (32, 48), "k_proj": (64, 48)}),
            [
                "wrong shape (6):",
                "found [64, 3], expected [16, 3]",
                "it fits a model with 2 layers, hidden size 48, LoRA rank 3, 32 rows in q_proj",
            ],
        ),
        (lambda: lora_tensors(layers=1), ["missing (8):", "layers.1.self_attn.q_proj.lora_A [3, "]),
        (lambda: lora_tensors(layers=3), ["unexpected (8):", "it fits a model with 3 layers"]),
        (
            lambda: {n: t for n, t in lora_tensors().items() if "k_proj.lora_B" not in n},
            ["missing (2):", "layers.0.self_attn.k_proj.lora_B [16, 3]"],
        ),
        (
            lambda: {
                **lora_tensors(),
                "base_model.model.lm_head.lora_A.weight": torch.zeros(3, 24),
            },
            ["unexpected (1):", "lm_head.lora_A"],
        ),
        (lambda: lora_tensors(r=0), ["wrong shape (16):", "found [0, 24], expected [1, 24]"]),
        (
            lambda: {**lora_tensors(), **distill_tensors(F=5)},
            ["wrong shape (4):", "found [4, 8, 5], expected [4, 8, 6]"],
        ),
    ],
)
def test_lora_of_another_model(base: Path, lora: Callable[[], State], parts: list[str]) -> None:
    message = refused(base, distill_tensors(), lora())
    assert "lora.pt: does not fit the base" in message
    for part in [*parts, BASE_IS]:
        assert part in message


def test_swapped_files(base: Path) -> None:
    message = refused(base, lora_tensors())
    assert "it looks like a LoRA file; give it with --lora" in message


def test_swapped_lora(base: Path) -> None:
    message = refused(base, distill_tensors(), distill_tensors())
    assert "lora.pt: no LoRA tensors; it looks like a distill file" in message


def test_adapters_in_two_files(base: Path) -> None:
    message = refused(base, one_file_tensors(), lora_tensors())
    assert "distill.pt: holds LoRA adapters itself, and " in message
    assert "leave out --lora" in message


def test_a_file_of_both_whose_adapters_do_not_fit(base: Path) -> None:
    tensors = {n: t for n, t in one_file_tensors().items() if "layers.1.self_attn.v_proj" not in n}
    assert "missing (2):\n  model.layers.1.self_attn.v_proj.lora_A [3, 24]" in refused(
        base, tensors
    )


def test_a_directory_of_shards(base: Path) -> None:
    shards = base.parent / "shards"
    shards.mkdir()
    assert f"format_utils dcp_to_torch {shards} FILE" in refused(base, shards)


def test_a_merge_that_overflows(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float16)
    lora = {name: t * 1000 for name, t in lora_tensors().items()}
    message = refused(base, distill_tensors(), lora)
    assert "_proj.weight: not finite in torch.float16 after merging the LoRA" in message


class Code:
    """Unpickled, it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("where", ["distill", "lora"])
def test_pickled_code_is_refused_and_not_run(base: Path, raw: bool, where: str) -> None:
    marker, path = base.parent / "it ran", base.parent / "evil.pt"
    content = {**distill_tensors(), "extra": Code(marker)}
    if raw:
        path.write_bytes(pickle.dumps({"extra": Code(marker)}, protocol=2))
    else:
        torch.save(content, path)
    files = (path, None) if where == "distill" else (distill_tensors(), path)
    message = refused(base, *files)
    assert "evil.pt: refused, it holds more than tensors" in message and "posix.mkdir" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Code(marker)))  # the file above was dangerous
    assert marker.exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("left", ["nothing", "half", "all but a byte", "noise"])
@pytest.mark.parametrize("where", ["distill", "lora"])
def test_a_truncated_file(base: Path, suffix: str, left: str, where: str) -> None:
    tensors = distill_tensors() if where == "distill" else lora_tensors()
    path = save(base.parent / f"cut.{suffix}", tensors)
    data = path.read_bytes()
    cut = {"nothing": b"", "half": data[: len(data) // 2], "all but a byte": data[:-1]}
    path.write_bytes(cut.get(left, b"hello, this is no checkpoint"))
    message = refused(base, *((path, None) if where == "distill" else (distill_tensors(), path)))
    assert f"cut.{suffix}: not a complete " in message
    assert "weights_only" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a state dict"),
        ({}, "must hold a state dict"),
        ({"model_state_dict": {}}, "must hold a state dict"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({7: torch.zeros(1)}, "7 is a Tensor"),
    ],
)
def test_what_is_no_state_dict(base: Path, content: object, message: str) -> None:
    assert message in refused(base, content)


def test_missing_files(base: Path) -> None:
    assert "nothing.pt: no such file" in refused(base, base.parent / "nothing.pt")


@pytest.mark.parametrize(
    ("alpha", "lora", "message"),
    [
        (32.0, None, "lora_alpha = 32.0: there is no LoRA file"),
        (float("nan"), {}, "lora_alpha = nan: must be a finite number"),
    ],
)
def test_bad_alpha(base: Path, alpha: float, lora: object, message: str) -> None:
    lora = None if lora is None else lora_tensors()
    assert message in refused(base, distill_tensors(), lora, lora_alpha=alpha)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"window_siz": 4}, "window_siz.*'window_size'"),
        ({"mixing": "both"}, "mixing = 'both'"),
        ({"feature_dim": 8}, "feature_dim: unknown key"),
        ({"num_state_heads": 4}, "num_state_heads: unknown key"),
    ],
)
def test_bad_options(base: Path, tmp_path: Path, overrides: dict, message: str) -> None:
    distill = save(tmp_path / "d.pt", distill_tensors())
    with pytest.raises((CheckpointError, LolaConfigError), match=message):
        convert_checkpoint(base, distill, tmp_path / "lola", overrides)
    assert not (tmp_path / "lola").exists()


def test_bad_bases(base: Path, tmp_path: Path) -> None:
    distill = save(tmp_path / "d.pt", distill_tensors())
    tensors = read_tensors(base)
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing .1.:\n  model.norm.weight"):
        convert_checkpoint(base, distill, tmp_path / "lola", {})
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors files"):
        convert_checkpoint(base, distill, tmp_path / "lola", {})
    with pytest.raises(CheckpointError, match="no such directory"):
        convert_checkpoint(tmp_path / "nowhere", distill, tmp_path / "lola", {})
    assert not (tmp_path / "lola").exists()


def test_force_never_deletes_an_input(base: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "config.json").touch()
    distill = save(work / "d.pt", distill_tensors())
    with pytest.raises(CheckpointError, match="would replace"):
        convert_checkpoint(base, distill, work, {}, force=True)
    lora, safe = save(work / "l.pt", lora_tensors()), save(tmp_path / "d.pt", distill_tensors())
    with pytest.raises(CheckpointError, match="would replace"):
        convert_checkpoint(base, safe, work, {}, lora, force=True)
    with pytest.raises(CheckpointError, match="--force"):
        convert_checkpoint(base, safe, work, {})
    assert distill.exists() and lora.exists()
