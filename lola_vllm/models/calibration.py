"""What `lola-vllm calibrate` finds, as a file and in a checkpoint: `HEAD_KEYS`, and importance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lola_vllm.core.config import DecoderConfig
from lola_vllm.core.lola_config import HEAD_KEYS
from lola_vllm.core.model_types import LOLA_TYPES
from lola_vllm.models.files import (
    INDEX_NAME,
    CheckpointError,
    open_weights,
    read_json,
    weight_files,
    write_json,
)
from lola_vllm.models.schema import settle_facts
from lola_vllm.models.staging import staged_directory

if TYPE_CHECKING:
    from torch import Tensor

_CARD_TITLE = "\n## Calibration"
_MAP = ".self_attn.feature_map_k"


def importance_tensors(importance: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Each layer's `[Hkv, d // 2 + d + 1]` by its name in a checkpoint."""
    return {f"model.layers.{i}.self_attn.importance": own for i, own in importance.items()}


def save_calibration(path: Path, keys: Mapping[str, Any], importance: Mapping[str, Tensor]) -> None:
    """Write keys of `lola_config`, as JSON in the metadata, and the tensors `importance` to a
    safetensors file."""
    from safetensors.torch import save_file

    save_file(dict(importance), path, {key: json.dumps(value) for key, value in keys.items()})


def load_calibration(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save_calibration` wrote.

    Raises:
        CheckpointError: another kind of file, or a damaged one.
    """
    with open_weights(path) as file:
        held = file.metadata() or {}
        if (first := HEAD_KEYS[0]) not in held:
            raise CheckpointError(f"{path}: holds no {first}; make it with 'lola-vllm calibrate'")
        keys = {key: json.loads(held[key]) for key in HEAD_KEYS if key in held}
        return keys, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_calibrated(
    source: Path,
    out: Path,
    keys: Mapping[str, Any],
    importance: Mapping[str, Tensor],
    *,
    force: bool = False,
    inputs: Iterable[Path] = (),
) -> DecoderConfig:
    """Write a copy of a LoLA model that has a calibration, completely or not at all.

    Args:
        source: a directory, of which hidden files are left out.
        out, force, inputs: as in `staging.check_output`; `source` is one of the inputs.
        keys: of `lola_config`. importance: tensors by name.

    Returns:
        The config of the copy.

    Raises:
        CheckpointError: `source` is no LoLA model, or `out` may not be written.
        LolaConfigError: another number of layers.
    """
    with staged_directory(out, force=force, inputs=[source, *inputs]) as staging:
        ignored = shutil.ignore_patterns(".*")
        shutil.copytree(source, staging, ignore=ignored, dirs_exist_ok=True)
        config = apply_calibration(staging, keys, importance)
        _write_card(staging / "README.md", keys)
        return config


def apply_calibration(
    model: Path, keys: Mapping[str, Any], importance: Mapping[str, Tensor]
) -> DecoderConfig:
    """Put a calibration into a LoLA model that is being written.

    Args:
        model: a directory that nobody reads yet.
        keys: of `lola_config`, which they replace. importance: tensors by name.

    Returns:
        The config that was written.

    Raises:
        CheckpointError: it is no LoLA model. LolaConfigError: another number of layers.
    """
    path = model / "config.json"
    raw = read_json(path)
    if raw.get("model_type") not in LOLA_TYPES:
        raise CheckpointError(f"{path}: model_type {raw.get('model_type')!r} is no LoLA model")
    raw["lola_config"] = {**raw.get("lola_config", {}), **keys}
    config: DecoderConfig = DecoderConfig.from_dict(dict(raw))
    config.check_sizes()
    if importance:
        _write_tensors(model, importance)
    write_json(path, raw)
    settle_facts(config, model)
    return config


def _write_card(card: Path, keys: Mapping[str, Any]) -> None:
    """Say in a model card, if there is one, what the calibration found.

    What the card says of an earlier calibration goes.
    """
    if not card.is_file():
        return
    before, _, rest = card.read_text(encoding="utf-8").partition(_CARD_TITLE)
    _, following, after = rest.partition("\n## ")
    found = "".join(f"    {json.dumps({key: value})}\n" for key, value in keys.items())
    card.write_text(
        f"{before.rstrip()}\n{_CARD_TITLE}\n\n`lola-vllm calibrate` divided the pairs among the KV "
        f"heads and fitted which to keep. It added to `lola_config`:\n\n{found}{following}{after}",
        encoding="utf-8",
    )


def _write_tensors(model: Path, added: Mapping[str, Tensor]) -> None:
    """Add tensors to a weight file that has maps, or replace them there."""
    from safetensors.torch import save_file

    for path in weight_files(model):
        with open_weights(path) as file:
            names, metadata = set(file.keys()), file.metadata()
            if not any(name.endswith(_MAP) for name in names):
                continue
            tensors = {name: file.get_tensor(name) for name in names}
        written = path.with_name(path.name + ".partial")  # `tensors` may be views of `path`
        save_file({**tensors, **added}, written, metadata)
        written.replace(path)
        if (model / INDEX_NAME).exists():
            index = read_json(model / INDEX_NAME)
            index["weight_map"].update(dict.fromkeys(added, path.name))
            write_json(model / INDEX_NAME, index)
        return
    raise CheckpointError(f"{model}: no weight file has maps")
