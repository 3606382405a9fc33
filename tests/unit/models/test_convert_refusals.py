"""`lola-vllm convert`: files that are damaged, dangerous or of another model leave no trace."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lola_vllm.models import CheckpointError
from lola_vllm.models.convert import convert_checkpoint
from tests.support.lolcats_files import (
    State,
    distill_tensors,
    listing,
    lora_tensors,
    make_base,
    one_file_tensors,
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


LAYER = "model.layers.1.self_attn.feature_map_q.mlp.layer"
SHAPED = "expected [4, 8, 6]"


def without(tensors: State, part: str) -> State:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def full_of_faults() -> State:
    tensors = without(distill_tensors(), "layers.0.self_attn.window_factors")
    tensors[LAYER] = tensors[LAYER][..., :5]
    return tensors | {f"model.layers.0.mlp.extra{i}": torch.zeros(1) for i in range(12)}


DISTILL: dict[str, tuple[Callable[[], object], list[str]]] = {
    "a deeper model": (
        lambda: distill_tensors(layers=3),
        ["distill.pt: does not fit the base\nunexpected (3):", LAYER.replace("1", "2")],
    ),
    "more query heads": (
        lambda: distill_tensors(Hq=8, Hs=8),
        ["wrong shape (6):", SHAPED],
    ),
    "larger heads": (
        lambda: distill_tensors(d=16),
        ["wrong shape (4):", SHAPED],
    ),
    "every fault": (
        full_of_faults,
        ["missing (1):\n  model.layers.0.self_attn.window_factors [4]", "and 2 more",
         "unexpected (12):\n  model.layers.0.mlp.extra0",
         f"wrong shape (1):\n  {LAYER}: found [4, 8, 5], {SHAPED}"],
    ),
    "integers": (
        lambda: {name: t.to(torch.int8) for name, t in distill_tensors().items()},
        ["found torch.int8, expected floating point"],
    ),
    "two names of one tensor": (
        lambda: distill_tensors() | {"layers.0.self_attn.window_factor": torch.zeros(4)},
        ["'layers.0.self_attn.window_factor' are the same tensor"],
    ),
    "a LoRA file": (lora_tensors, ["it looks like a LoRA file; give it with --lora"]),
    "both, of which adapters are missing": (
        lambda: without(one_file_tensors(), "layers.1.self_attn.v_proj"),
        ["missing (2):\n  model.layers.1.self_attn.v_proj.lora_A [3, 24]"],
    ),
    "a list": (lambda: [1, 2], ["must hold a state dict"]),
}  # fmt: skip
LORA: dict[str, tuple[Callable[[], object], list[str]]] = {
    "a wider model": (
        lambda: lora_tensors(rows={"q_proj": (32, 48), "k_proj": (64, 48)}),
        ["wrong shape (6):", "found [64, 3], expected [16, 3]"],
    ),
    "half of an adapter": (
        lambda: without(lora_tensors(), "k_proj.lora_B"),
        ["missing (2):", "layers.0.self_attn.k_proj.lora_B [16, 3]"],
    ),
    "an adapter of the output": (
        lambda: lora_tensors() | {"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 24)},
        ["unexpected (1):", "lm_head.lora_A"],
    ),
    "maps of other sizes": (
        lambda: lora_tensors() | distill_tensors(F=5),
        ["wrong shape (4):", f"found [4, 8, 5], {SHAPED}"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("distill", "words"), DISTILL.values(), ids=DISTILL)
def test_maps_of_another_model(base: Path, distill: Callable[[], object], words: list[str]) -> None:
    message = refused(base, distill())
    assert [part for part in words if part not in message] == [], message


@pytest.mark.parametrize(("lora", "words"), LORA.values(), ids=LORA)
def test_lora_of_another_model(base: Path, lora: Callable[[], object], words: list[str]) -> None:
    message = refused(base, distill_tensors(), lora())
    words = [*words, "lora.pt: does not fit the base"]
    assert [part for part in words if part not in message] == [], message


def test_files_and_numbers_that_do_not_go_together(base: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    maps, lora, both = distill_tensors(), lora_tensors(), one_file_tensors()
    for i, (files, options, words) in enumerate([
        ((maps, maps), {}, ["lora.pt: no LoRA tensors; it looks like a distill file"]),
        ((both, lora), {}, ["distill.pt: holds LoRA adapters itself, and ", "leave out --lora"]),
        ((shards,), {}, [f"format_utils dcp_to_torch {shards} FILE"]),
        ((tmp_path / "nothing.pt",), {}, ["nothing.pt: no such file"]),
        ((maps,), {"lora_alpha": 32.0}, ["lora_alpha = 32.0: there is no LoRA file"]),
        ((maps, lora), {"lora_alpha": float("nan")}, ["lora_alpha = nan: must be a finite number"]),
    ]):  # fmt: skip
        work = tmp_path / str(i)
        work.mkdir()
        base = base.rename(work / "base")
        message = refused(base, *files, **options)
        assert [part for part in words if part not in message] == [], message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["distill", "lora"])
def test_values_that_are_not_finite(base: Path, value: float, where: str) -> None:
    distill, lora = distill_tensors(), lora_tensors()
    tensors = distill if where == "distill" else lora
    name = list(tensors)[1]
    tensors[name].flatten()[3] = value
    assert f"{name} holds values that are not finite" in refused(base, distill, lora)


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
