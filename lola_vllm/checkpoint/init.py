"""A LoLA checkpoint from a plain Llama: the same weights plus untrained feature maps."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lola_vllm.checkpoint.files import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointError,
    open_weights,
    read_json,
    read_shapes,
    weight_files,
    write_json,
)
from lola_vllm.checkpoint.schema import (
    LOLA_TENSORS,
    WINDOW_FACTOR_INIT,
    check_tensors,
    expected_tensors,
)
from lola_vllm.checkpoint.staging import staged_directory
from lola_vllm.config import ARCHITECTURE, MODEL_TYPE, LolaConfigError, LolaLlamaConfig

if TYPE_CHECKING:
    import torch

BASE_MODEL_TYPES = ("llama",)
StateHeads = Literal["kv", "query"]

# What a server needs besides config and weights, and what the licences of the base want kept.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def init_checkpoint(
    base: Path,
    out: Path,
    config_overrides: Mapping[str, Any],
    state_heads: StateHeads = "kv",
    *,
    force: bool = False,
) -> LolaLlamaConfig:
    """Write a LoLA checkpoint with the weights of a Llama and identity feature maps.

    The maps are LoLCATs' starting point: `W = eye(d, F)` for every head, in the dtype of the
    layer's `q_proj`, and window factors of -2.197 (g = 0.1) in float32. At most one safetensors
    file of the base is held in memory.

    Args:
        base: a Hugging Face Llama directory, sharded or not, embeddings tied or not.
        out: where the checkpoint goes; it appears whole or not at all.
        config_overrides: keys of `lola_config` to set; others keep LoLA's defaults.
            `feature_dim` defaults to the head size, the only size an identity map can have.
        state_heads: "kv": one key map per KV head (Hs = Hkv); "query": one per query head.
        force: replace a model that is already at `out`.

    Returns:
        The config that was written.

    Raises:
        CheckpointError: a base that is missing, damaged or no Llama, or an `out` in the way.
        LolaConfigError: overrides that are not valid.
    """
    config_json = _config_json(base, config_overrides, state_heads)
    config = _parse_config(base, config_json)
    num_state_heads = config_json["lola_config"]["num_state_heads"]
    expected = expected_tensors(config, num_state_heads)
    if not weight_files(base):
        raise CheckpointError(
            f"{base}: no safetensors files; convert other formats with save_pretrained first"
        )
    # The base is checked before gigabytes are copied, the result before it takes its place.
    maps = {name: shape for name, shape in expected.items() if name.endswith(LOLA_TENSORS)}
    check_tensors(expected, {**read_shapes(base), **maps})

    with staged_directory(out, force=force, inputs=[base]) as staging:
        write_json(staging / "config.json", config_json)
        _copy_companions(base, staging)
        _write_weights(base, staging, expected)
        check_tensors(expected, read_shapes(staging))
    return config


def _config_json(
    base: Path, config_overrides: Mapping[str, Any], state_heads: StateHeads
) -> dict[str, Any]:
    """The base's `config.json`, field by field, with LoLA's three changes."""
    if not base.is_dir():
        raise CheckpointError(f"{base}: no such directory; give a local Llama model directory")
    raw = read_json(base / "config.json")
    if raw.get("model_type") not in BASE_MODEL_TYPES:
        raise CheckpointError(
            f"{base}: model_type {raw.get('model_type')!r} is not supported; "
            f"supported: {', '.join(BASE_MODEL_TYPES)}"
        )
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"{base}: quantized weights are not supported; use the model's full-precision weights"
        )
    if state_heads not in get_args(StateHeads):
        raise CheckpointError(f"state_heads = {state_heads!r}: must be 'kv' or 'query'")
    if "num_state_heads" in config_overrides:
        raise CheckpointError("num_state_heads follows from state_heads; give that instead")

    llama = _parse_config(base, raw)
    feature_dim = config_overrides.get("feature_dim", llama.head_dim)
    if feature_dim != llama.head_dim:
        raise CheckpointError(
            f"feature_dim = {feature_dim}: identity maps need the head size, {llama.head_dim}"
        )
    heads = llama.num_key_value_heads if state_heads == "kv" else llama.num_attention_heads
    lola_config = {**config_overrides, "feature_dim": feature_dim, "num_state_heads": heads}
    return {
        **raw,
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "lola_config": lola_config,
    }


def _parse_config(base: Path, raw: dict[str, Any]) -> LolaLlamaConfig:
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = LolaLlamaConfig.from_dict({**raw, "model_type": MODEL_TYPE})
    except LolaConfigError:
        raise
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"{base / 'config.json'}: {error}") from error
    assert isinstance(config, LolaLlamaConfig)
    return config


def _copy_companions(base: Path, out: Path) -> None:
    for pattern in _COMPANIONS:
        for path in base.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, out / path.name)
            else:
                shutil.copyfile(path, out / path.name)


def _write_weights(base: Path, out: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Copy the base's files one by one; a layer's maps go into the file with its `q_proj`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total_size = 0
    for path in weight_files(base):
        with open_weights(path) as source:
            tensors: dict[str, torch.Tensor] = {}
            for name in source.keys():  # noqa: SIM118 (safe_open has no __iter__)
                if name not in expected:
                    continue  # buffers and a tied lm_head, see check_tensors
                tensors[name] = source.get_tensor(name)
                if name.endswith("self_attn.q_proj.weight"):
                    prefix = name.removesuffix("q_proj.weight")
                    tensors |= _identity_maps(prefix, expected, tensors[name].dtype)
            try:
                save_file(tensors, str(out / path.name), metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk arrives as one of these
                raise CheckpointError(f"cannot write {path.name}: {error}") from error
        weight_map |= dict.fromkeys(tensors, path.name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if set(weight_map.values()) != {SINGLE_NAME}:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(out / INDEX_NAME, index)


def _identity_maps(
    prefix: str, expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    import torch

    tensors = {}
    for kind in ("feature_map_q", "feature_map_k"):
        heads, d, F = expected[prefix + kind]
        # One copy per head: safetensors refuses tensors that share memory.
        tensors[prefix + kind] = torch.eye(d, F, dtype=dtype).repeat(heads, 1, 1)
    factors = expected[prefix + "window_factors"]
    tensors[prefix + "window_factors"] = torch.full(factors, WINDOW_FACTOR_INIT)
    return tensors
