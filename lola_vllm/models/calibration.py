"""What `lola-vllm calibrate` finds, as a file and in a checkpoint: sizes, and importance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lola_vllm.core.config import DecoderConfig
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

KEYS = ("sparse_cache_size", "recent_size")  # in the file's metadata, as JSON
# As `lola_config.sparse_cache_size` has them.
Sizes = list[int] | list[list[int]]
_CARD_TITLE = "\n## Calibration"
_MAP = ".self_attn.feature_map_k"


def importance_tensors(importance: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Each layer's `[Hkv, d // 2 + d + 1]` by its name in a checkpoint."""
    return {f"model.layers.{i}.self_attn.importance": own for i, own in importance.items()}


def save_calibration(
    path: Path, sizes: Mapping[str, Sizes], importance: Mapping[str, Tensor]
) -> None:
    """Write sizes, by key of `lola_config`, and the tensors `importance` to a safetensors file."""
    from safetensors.torch import save_file

    save_file(dict(importance), path, {key: json.dumps(sizes[key]) for key in KEYS})


def load_calibration(path: Path) -> tuple[dict[str, Sizes], dict[str, Tensor]]:
    """What `save_calibration` wrote.

    Raises:
        CheckpointError: another kind of file, or a damaged one.
    """
    with open_weights(path) as file:
        held = file.metadata() or {}
        if not all(key in held for key in KEYS):
            raise CheckpointError(
                f"{path}: holds no {' and '.join(KEYS)}; make it with 'lola-vllm calibrate'"
            )
        sizes = {key: json.loads(held[key]) for key in KEYS}
        return sizes, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_calibrated(
    source: Path,
    out: Path,
    sizes: Mapping[str, Sizes],
    importance: Mapping[str, Tensor],
    *,
    force: bool = False,
    inputs: Iterable[Path] = (),
) -> DecoderConfig:
    """Write a copy of a LoLA model that has a calibration, completely or not at all.

    Args:
        source: a directory, of which hidden files are left out.
        out, force, inputs: as in `staging.check_output`; `source` is one of the inputs.
        sizes: by key of `lola_config`. importance: tensors by name.

    Returns:
        The config of the copy.

    Raises:
        CheckpointError: `source` is no LoLA model, or `out` may not be written.
        LolaConfigError: another number of layers.
    """
    with staged_directory(out, force=force, inputs=[source, *inputs]) as staging:
        ignored = shutil.ignore_patterns(".*")
        shutil.copytree(source, staging, ignore=ignored, dirs_exist_ok=True)
        config = apply_calibration(staging, sizes, importance)
        _write_card(staging / "README.md", sizes)
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


def _write_card(card: Path, sizes: Mapping[str, Sizes]) -> None:
    """Say in a model card, if there is one, which sizes the calibration found.

    What the card says of an earlier calibration goes.
    """
    if not card.is_file():
        return
    before, _, rest = card.read_text(encoding="utf-8").partition(_CARD_TITLE)
    _, following, after = rest.partition("\n## ")
    found = "".join(f"    {json.dumps({key: size})}\n" for key, size in sizes.items())
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
