"""`lola-vllm convert`: files that are damaged, dangerous or of another model leave no trace."""

import os
import pickle
from pathlib import Path
from typing import Any

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
def base(tmp_path) -> Path:
    return make_base(tmp_path / "base")


def refused(base: Path, distill: object, lora: object = None, **options: Any) -> str:
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
UNFIT = "lora.pt: does not fit the base"


def without(tensors: State, part: str) -> State:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def full_of_faults() -> State:
    tensors = without(distill_tensors(), "layers.0.self_attn.window_factors")
    tensors[LAYER] = tensors[LAYER][..., :5]
    return tensors | {f"model.layers.0.mlp.extra{i}": torch.zeros(1) for i in range(12)}


MAPS, LORA, BOTH = distill_tensors(), lora_tensors(), one_file_tensors()
# What is given as distill file, LoRA file and options, and what the message has.
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a deeper model": (
        {"distill": distill_tensors(layers=3)},
        ["distill.pt: does not fit the base\nunexpected (3):", LAYER.replace("1", "2")],
    ),
    "more query heads": ({"distill": distill_tensors(Hq=8, Hs=8)}, ["wrong shape (6):", SHAPED]),
    "larger heads": ({"distill": distill_tensors(d=16)}, ["wrong shape (4):", SHAPED]),
    "every fault": (
        {"distill": full_of_faults()},
        ["missing (1):\n  model.layers.0.self_attn.window_factors [4]", "and 2 more",
         "unexpected (12):\n  model.layers.0.mlp.extra0",
         f"wrong shape (1):\n  {LAYER}: found [4, 8, 5], {SHAPED}"],
    ),
    "integers": (
        {"distill": {name: t.to(torch.int8) for name, t in MAPS.items()}},
        ["found torch.int8, expected floating point"],
    ),
    "two names of one tensor": (
        {"distill": MAPS | {"layers.0.self_attn.window_factor": torch.zeros(4)}},
        ["'layers.0.self_attn.window_factor' are the same tensor"],
    ),
    "a LoRA file": ({"distill": LORA}, ["it looks like a LoRA file; give it with --lora"]),
    "both, of which adapters are missing": (
        {"distill": without(BOTH, "layers.1.self_attn.v_proj")},
        ["missing (2):\n  model.layers.1.self_attn.v_proj.lora_A [3, 24]"],
    ),
    "a list": ({"distill": [1, 2]}, ["must hold a state dict"]),
    "LoRA of a wider model": (
        {"lora": lora_tensors(rows={"q_proj": (32, 48), "k_proj": (64, 48)})},
        [UNFIT, "wrong shape (6):", "found [64, 3], expected [16, 3]"],
    ),
    "half of an adapter": (
        {"lora": without(LORA, "k_proj.lora_B")},
        [UNFIT, "missing (2):", "layers.0.self_attn.k_proj.lora_B [16, 3]"],
    ),
    "an adapter of the output": (
        {"lora": LORA | {"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 24)}},
        [UNFIT, "unexpected (1):", "lm_head.lora_A"],
    ),
    "maps of other sizes": (
        {"lora": LORA | distill_tensors(F=5)},
        [UNFIT, "wrong shape (4):", f"found [4, 8, 5], {SHAPED}"],
    ),
    "maps twice": ({"lora": MAPS}, ["lora.pt: no LoRA tensors; it looks like a distill file"]),
    "adapters twice": (
        {"distill": BOTH, "lora": LORA},
        ["distill.pt: holds LoRA adapters itself, and ", "leave out --lora"],
    ),
    "alpha of no LoRA": (
        {"lora_alpha": 32.0}, ["lora_alpha = 32.0: there is no LoRA file"],
    ),
    "alpha that is no number": (
        {"lora": LORA, "lora_alpha": float("nan")}, ["lora_alpha = nan: must be a finite number"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_named(base, given, words):
    message = refused(base, **{"distill": MAPS, **given})
    assert [part for part in words if part not in message] == [], message


def test_paths_without_a_state_dict(base, tmp_path):
    assert "nothing.pt: no such file" in refused(base, tmp_path / "nothing.pt")
    (tmp_path / "lola" / "config.json").unlink()
    (tmp_path / "lola").rmdir()
    assert f"format_utils dcp_to_torch {tmp_path} FILE" in refused(base, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["distill", "lora"])
def test_values_that_are_not_finite(base, value, where):
    files = {"distill": distill_tensors(), "lora": lora_tensors()}
    name = list(files[where])[1]
    files[where][name].flatten()[3] = value
    assert f"{name} holds values that are not finite" in refused(base, **files)


def test_a_merge_that_overflows(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.float16)
    message = refused(base, MAPS, {name: t * 1000 for name, t in LORA.items()})
    assert "_proj.weight: not finite in torch.float16 after merging the LoRA" in message


class Code:
    """Unpickled, it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("where", ["distill", "lora"])
def test_pickled_code_is_refused_and_not_run(base, raw, where):
    marker, path = base.parent / "it ran", base.parent / "evil.pt"
    if raw:
        path.write_bytes(pickle.dumps({"extra": Code(marker)}, protocol=2))
    else:
        torch.save({**MAPS, "extra": Code(marker)}, path)
    message = refused(base, **{"distill": MAPS, where: path})
    assert "evil.pt: refused, it holds more than tensors" in message and "posix.mkdir" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Code(marker)))  # the file above was dangerous
    assert marker.exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("left", ["nothing", "half", "all but a byte", "noise"])
@pytest.mark.parametrize("where", ["distill", "lora"])
def test_a_truncated_file(base, suffix, left, where):
    path = save(base.parent / f"cut.{suffix}", MAPS if where == "distill" else LORA)
    data = path.read_bytes()
    cut = {"nothing": b"", "half": data[: len(data) // 2], "all but a byte": data[:-1]}
    path.write_bytes(cut.get(left, b"hello, this is no checkpoint"))
    message = refused(base, **{"distill": MAPS, where: path})
    assert f"cut.{suffix}: not a complete " in message
    assert "weights_only" not in message
