"""A checkpoint with the weights of its linear layers in 8 or 4 bits, as vLLM reads it.

The format is compressed-tensors. Weights are rounded to the nearest value, without calibration
data. Feature maps, norms and embeddings are not changed. The output matrix gets 8 bits, because it
is a fifth of what a small model reads for a token. If it was tied to the embeddings, it is stored
separately.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lola_vllm.models.base import copy_companions
from lola_vllm.models.files import (
    INDEX_NAME,
    CheckpointError,
    open_weights,
    read_json,
    weight_files,
    write_json,
)
from lola_vllm.models.staging import staged_directory

if TYPE_CHECKING:
    from torch import Tensor

Weights = Literal["int8", "int4"]
GROUP_SIZE = 32  # weights of a row that share a scale, for 4 bits
_OF_LOLA = ("README.md", "modeling_lola.py")  # `copy_companions` does not copy these
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_GROUP = {
    "int8": {"num_bits": 8, "strategy": "channel"},
    "int4": {"num_bits": 4, "strategy": "group", "group_size": GROUP_SIZE},
}


def quantize_checkpoint(source: Path, out: Path, weights: Weights, *, force: bool = False) -> None:
    """Write a model directory again with its weights in fewer bits.

    Args:
        source: a LoLA or plain Llama directory, not quantized.
        out: where the copy goes; it is written completely or not at all.
        weights: "int8": one scale per row; "int4": one scale per 32 weights of a row.
        force: replace a model that is already at `out`.

    Raises:
        CheckpointError: a source that is missing, damaged, quantized already or no Llama
            (`LLAMA_TYPES`), a weight whose rows cannot be cut into groups, or an `out` that may not
            be replaced.
    """
    from safetensors.torch import save_file

    from lola_vllm.core.model_types import LLAMA_TYPES, LOLA_TYPES, base_type_of

    if weights not in get_args(Weights):
        raise CheckpointError(f"weights = {weights!r}: must be 'int8' or 'int4'")
    config = read_json(source / "config.json")
    if "quantization_config" in config:
        raise CheckpointError(f"{source}: quantized already; take the model it was made from")
    kind = config.get("model_type")
    kind = base_type_of(config) if kind in LOLA_TYPES else kind
    if kind not in LLAMA_TYPES:
        raise CheckpointError(
            f"{source}: a model of type {kind!r}: quantize knows the layers of "
            f"{', '.join(LLAMA_TYPES)}; llm-compressor quantizes others"
        )
    pack = _int8 if weights == "int8" else _int4
    weight_map: dict[str, str] = {}
    with staged_directory(out, force=force, inputs=[source]) as staging:
        copy_companions(source, staging)
        for name in _OF_LOLA:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        for path in weight_files(source):
            tensors: dict[str, Tensor] = {}
            with open_weights(path) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open has no __iter__)
                    tensors |= _convert(name, file.get_tensor(name), pack, config)
            save_file(tensors, staging / path.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, path.name)
        if (source / INDEX_NAME).is_file():
            write_json(staging / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
        write_json(staging / "config.json", _config(config, weights))


def _config(config: dict[str, Any], weights: Weights) -> dict[str, Any]:
    groups = zip(("Linear", "re:.*lm_head"), (weights, "int8"), strict=True)
    return {
        **config,
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": [],
            "config_groups": {
                f"group_{number}": {
                    "targets": [target],
                    "weights": {"type": "int", "symmetric": True, "dynamic": False, **_GROUP[kind]},
                }
                for number, (target, kind) in enumerate(groups)
            },
        },
    }


def _convert(
    name: str,
    tensor: Tensor,
    pack: Callable[[str, Tensor], dict[str, Tensor]],
    config: dict[str, Any],
) -> dict[str, Tensor]:
    if name.endswith("_proj.weight"):
        return pack(name, tensor)
    tied = config.get("tie_word_embeddings", False)
    if name == EMBEDDING and tied:
        return {name: tensor, **_int8(HEAD, tensor)}
    if name == HEAD:
        return {} if tied else _int8(name, tensor)
    return {name: tensor}


def _int8(name: str, weight: Tensor) -> dict[str, Tensor]:
    values = weight.float()
    scale = (values.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12).to(weight.dtype)
    return _packed(name, weight, values / scale.float(), scale, 8)


def _int4(name: str, weight: Tensor) -> dict[str, Tensor]:
    if weight.shape[1] % GROUP_SIZE:
        raise CheckpointError(
            f"{name}: rows of {weight.shape[1]} cannot be cut into groups of {GROUP_SIZE}; use int8"
        )
    groups = weight.float().unflatten(1, (-1, GROUP_SIZE))
    scale = _best_scale(groups).to(weight.dtype)
    return _packed(name, weight, (groups / scale.float()).flatten(1), scale.squeeze(-1), 4)


def _packed(
    name: str, weight: Tensor, scaled: Tensor, scale: Tensor, bits: int
) -> dict[str, Tensor]:
    """Whole numbers of a row in int32, the first one in its lowest bits."""
    import torch

    half, count = 2 ** (bits - 1), 32 // bits
    if weight.shape[1] % count:
        raise CheckpointError(
            f"{name}: rows of {weight.shape[1]} do not fill words of {count} numbers"
        )
    numbers = scaled.round().clamp(-half, half - 1).to(torch.int64) + half
    words = (numbers.unflatten(1, (-1, count)) << (bits * torch.arange(count))).sum(-1)
    return {
        f"{name}_packed": torch.where(words >= 2**31, words - 2**32, words).to(torch.int32),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(weight.shape),
    }


def _best_scale(groups: Tensor) -> Tensor:
    """`[..., GROUP_SIZE]` -> `[..., 1]`: of some scales, the one with the smallest error.

    The grid has one value more below zero than above, so the sign of a scale matters too.
    """
    import torch

    at_most = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best, least = None, None
    for steps in (-8.0, -7.5, -7.0, -6.5, -6.0, 7.0, 6.5, 6.0):
        scale = torch.where(at_most == 0, 1.0, at_most / steps)
        error = (((groups / scale).round().clamp(-8, 7) * scale - groups) ** 2).sum(-1, True)
        if best is None or least is None:
            best, least = scale, error
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    assert best is not None
    return best
