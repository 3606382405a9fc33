"""Reading the safetensors files of a model directory, with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lola_vllm.core.compact_json import compact_lists

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class CheckpointError(ValueError):
    """A model directory that cannot be used; the message names what is wrong and the remedy."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: it is missing, unreadable as JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name} there") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` the way Hugging Face does: two spaces and a newline at the end.

    Lists of numbers take as few lines as they need.
    """
    text = compact_lists(json.dumps(value, indent=2, ensure_ascii=False))
    path.write_text(f"{text}\n", encoding="utf-8")


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model: those its index names, else `model.safetensors`, else all.

    Returns:
        Existing paths, sorted; empty if the directory has none.

    Raises:
        CheckpointError: an index that is malformed or names a file that is not there.
    """
    index = model_dir / INDEX_NAME
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            if not (model_dir / name).is_file():
                raise CheckpointError(
                    f"{model_dir}: {INDEX_NAME} names {name!r}, which is missing; "
                    "copy or download it again"
                )
        return [model_dir / name for name in names]
    if (model_dir / SINGLE_NAME).is_file():
        return [model_dir / SINGLE_NAME]
    return sorted(model_dir.glob("*.safetensors"))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    # A file name with a folder in it would make a model directory read outside itself.
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise CheckpointError(f"{index}: 'weight_map' must map tensor names to file names")
    return weight_map


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """`safetensors.safe_open(path, "pt")`, whose errors become `CheckpointError` naming `path`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); copy or download it again"
        ) from None


def read_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor in the model, from the file headers alone.

    Raises:
        CheckpointError: a damaged or missing file, or one tensor in two files.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(model_dir):
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118 (safe_open has no __iter__)
                if name in shapes:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is in another file of {model_dir} too"
                    )
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes
