"""The base of a checkpoint: a Hugging Face directory, read, checked and copied shard by shard."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lola_vllm.core.config import DecoderConfig
from lola_vllm.core.lola_config import (
    SEVERAL_TABLES,
    LolaConfig,
    LolaConfigError,
    default_context_shift,
)
from lola_vllm.core.model_types import MODEL_TYPE, architecture_of, explain_field
from lola_vllm.models.families import BASE_NAMES, check_base
from lola_vllm.models.files import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointError,
    open_weights,
    read_json,
    read_shapes,
    weight_files,
    write_json,
)
from lola_vllm.models.remote_code import AUTO_MAP, write_remote_code
from lola_vllm.models.schema import (
    OUTPUT_PROJECTIONS,
    WINDOW_FACTOR_INIT,
    Shape,
    check_tensors,
    expected_tensors,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The weight of a layer's output projection.
_OUTPUT = re.compile(rf"(.*\.self_attn\.)(?:{'|'.join(OUTPUT_PROJECTIONS)})\.weight")

# Files that a server needs besides config and weights, and files that the base's licence requires.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def read_base_config(base: Path) -> dict[str, Any]:
    """The base's `config.json` with LoLA's model type and architecture, all else as it is.

    Raises:
        CheckpointError: no such directory, a model that is not supported, or quantized weights.
    """
    if not base.is_dir():
        raise CheckpointError(f"{base}: no such directory; give a local {BASE_NAMES} directory")
    path = base / "config.json"
    raw = read_json(path)
    check_base(path, raw)
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"{base}: quantized weights are not supported; use the model's full-precision weights"
        )
    return lola_fields(raw)


def fingerprint_base(base: Path) -> bytes:
    """Bytes of a base's config and of its files' names and sizes: another base has others."""
    files = sorted(base.glob("*.safetensors"))
    sizes = "".join(f"{path.name} {path.stat().st_size}" for path in files)
    return (base / "config.json").read_bytes() + sizes.encode()


def lola_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A base's `config.json`, which `check_base` has seen, as that of a LoLA model; `lola_config`
    is not in it yet."""
    from transformers import CONFIG_MAPPING

    kind = raw["model_type"]
    own = CONFIG_MAPPING[kind].from_dict(dict(raw))
    return {
        **raw,
        "model_type": MODEL_TYPE,
        "base_model_type": kind,
        "architectures": [architecture_of(own, kind)],
    }


def parse_config(base: Path, raw: dict[str, Any]) -> DecoderConfig:
    """`raw` as a config; faults are reported as those of the base's `config.json`."""
    return config_of(base / "config.json", raw)


def config_of(path: Path, raw: dict[str, Any]) -> DecoderConfig:
    """`raw`, a LoLA model's `config.json` at `path`, as a config.

    Raises:
        CheckpointError: a field that transformers refuses; names file, field and value.
        LolaConfigError: a `lola_config` that is not valid.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = DecoderConfig.from_dict(dict(raw))
    except LolaConfigError:
        raise
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {explain_field(error)}") from error
    assert isinstance(config, DecoderConfig)
    return config


def with_context_shift(base: DecoderConfig, lola_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys `lola_config` of a new checkpoint, and `context_shift` if it is not among them.

    Raises:
        LolaConfigError: one that does not suit the base's trained length.
    """
    length = base.max_position_embeddings
    rope = (getattr(base, "rope_parameters", None) or {}).get("rope_type", "default")
    shift = 0 if rope in SEVERAL_TABLES else default_context_shift(length)
    keys = {"context_shift": shift, **lola_config}
    LolaConfig(**keys).check_context_shift(length)
    return keys


def write_checkpoint(
    base: Path,
    out: Path,
    config_json: dict[str, Any],
    config: DecoderConfig,
    trained: Mapping[str, Tensor],
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Write a LoLA checkpoint to an empty directory.

    At most one safetensors file of the base is held in memory.

    Args:
        config_json: what is written as `config.json`, beside the name of the file by which plain
            transformers finds LoLA's code. config: the same, with its facts.
        trained: LoLA's tensors by name; others are LoLCATs' starting point: `eye(d, F)` for every
            head, and window factors of -2.197 (g = 0.1). Maps get the dtype of the layer's output
            projection, window factors float32.
        change: from a name and a tensor of the base to the tensor to write; default: no change.

    Raises:
        CheckpointError: a base without layers that the config speaks of, or a file that cannot be
            written.
    """
    expected = expected_tensors(config)
    if not weight_files(base):
        raise CheckpointError(
            f"{base}: no safetensors files; convert other formats with save_pretrained first"
        )
    write_json(out / "config.json", {**config_json, "auto_map": AUTO_MAP})
    write_remote_code(out)
    copy_companions(base, out)
    _write_weights(base, out, expected, trained, change)
    check_tensors(expected, read_shapes(out))  # before it is moved to its place


def _layer_maps(
    prefix: str, expected: Mapping[str, Shape], trained: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """LoLA's tensors of the layer at a prefix; none if it slides."""
    import torch

    tensors = {}
    for name, shape in expected.items():
        if not name.startswith(prefix):
            continue
        is_factor = name.endswith("window_factors")
        # Copies: safetensors refuses strides, and tensors that share memory (tied maps do).
        if name in trained:
            own = torch.float32 if is_factor else dtype
            tensors[name] = trained[name].to(own, copy=True).contiguous()
        elif is_factor:
            tensors[name] = torch.full(shape, WINDOW_FACTOR_INIT)
        else:
            tensors[name] = torch.eye(*shape[1:], dtype=dtype).repeat(shape[0], 1, 1)
    return tensors


def copy_companions(base: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence files."""
    for pattern in _COMPANIONS:
        for path in base.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, out / path.name)
            else:
                shutil.copyfile(path, out / path.name)


def _write_weights(
    base: Path,
    out: Path,
    expected: Mapping[str, Shape],
    trained: Mapping[str, Tensor],
    change: Callable[[str, Tensor], Tensor] | None,
) -> None:
    """Copy the base's files one by one; a layer's maps go into the file with its output projection.

    Raises:
        CheckpointError: a file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total_size = 0
    for path in weight_files(base):
        with open_weights(path) as source:
            tensors: dict[str, Tensor] = {}
            for name in source.keys():  # noqa: SIM118 (safe_open has no __iter__)
                tensor = source.get_tensor(name)
                tensors[name] = change(name, tensor) if change else tensor
                if output := _OUTPUT.fullmatch(name):
                    tensors |= _layer_maps(output[1], expected, trained, tensor.dtype)
            try:
                save_file(tensors, str(out / path.name), metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk arrives as one of these
                raise CheckpointError(f"cannot write {path.name}: {error}") from error
        weight_map |= dict.fromkeys(tensors, path.name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if set(weight_map.values()) != {SINGLE_NAME}:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(out / INDEX_NAME, index)
