"""Working directories, and training states in them, from which an interrupted run continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lola_vllm.models.files import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


class TrainingState(NamedTuple):
    """Tensors by name, and other values that JSON can hold."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def default_work(out: Path) -> Path:
    """The working directory of a run that names none."""
    return out.with_name(out.name + ".training")


def open_work(work: Path, *, resume: bool) -> None:
    """Make a working directory, or go on with one.

    Raises:
        CheckpointError: it holds something, without `resume`.
    """
    if not resume and work.is_dir() and any(work.iterdir()):
        raise CheckpointError(
            f"{work}: holds an earlier run; go on with it by --resume, or name another --work-dir"
        )
    work.mkdir(parents=True, exist_ok=True)


def write_state(
    work: Path, name: str, fingerprint: str, tensors: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Replace the state `name` in `work`, completely or not at all.

    Raises:
        CheckpointError: it cannot be written, for example on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = work / f"{name}.safetensors"
    part = path.with_suffix(".part")
    header = {"fingerprint": fingerprint, "meta": json.dumps(meta)}
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, part, header)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot write the training state: {error}") from error


def read_state(work: Path, name: str, fingerprint: str) -> TrainingState | None:
    """The state `name` in `work`, or None if there is none.

    Raises:
        CheckpointError: it is damaged, or of a run with other inputs or options.
    """
    from safetensors import SafetensorError, safe_open

    path = work / f"{name}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            meta = json.loads(header["meta"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete it to start again") from error
    if header.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path}: of a run with another model, data or options; give the same ones, another "
            "--work-dir, or delete it to start again"
        )
    return TrainingState(tensors, meta)
