"""A LoLA checkpoint from a base: the same weights plus untrained feature maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lola_vllm.core.config import DecoderConfig, TensorFacts
from lola_vllm.models.base import (
    parse_config,
    read_base_config,
    with_context_shift,
    write_checkpoint,
)
from lola_vllm.models.files import CheckpointError
from lola_vllm.models.schema import WINDOW_FACTOR_INIT, Shape
from lola_vllm.models.staging import staged_directory

if TYPE_CHECKING:
    import torch

StateHeads = Literal["kv", "query"]


def init_checkpoint(
    base: Path,
    out: Path,
    config_overrides: Mapping[str, Any],
    state_heads: StateHeads = "kv",
    *,
    force: bool = False,
) -> DecoderConfig:
    """Write a LoLA checkpoint with the weights of a base and identity feature maps.

    The maps are LoLCATs' starting point: `W = eye(d, F)` for every head, in the dtype of the
    layer's output projection, and window factors of -2.197 (g = 0.1) in float32. At most one
    safetensors file of the base is held in memory.

    Args:
        base: the directory of a decoder (`families.py`), sharded or not, embeddings tied or not.
        out: where the checkpoint goes; it is written completely or not at all.
        config_overrides: keys of `lola_config` to set; others keep LoLA's defaults, but for
            `context_shift`, a quarter of the base's trained length.
        state_heads: "kv": one key map per KV head (Hs = Hkv); "query": one per query head.
        force: replace a model that is already at `out`.

    Returns:
        The config that was written.

    Raises:
        CheckpointError: a base that is missing, damaged or not supported, or an `out` that may not
            be replaced.
        LolaConfigError: overrides that are not valid.
    """
    config_json = _config_json(base, config_overrides, state_heads)
    config = parse_config(base, config_json)
    heads = config.num_key_value_heads if state_heads == "kv" else config.num_attention_heads
    config.facts = TensorFacts(config.head_dim, heads)
    with staged_directory(out, force=force, inputs=[base]) as staging:
        write_checkpoint(base, staging, config_json, config, _identity_maps)
    return config


def _config_json(
    base: Path, config_overrides: Mapping[str, Any], state_heads: StateHeads
) -> dict[str, Any]:
    if state_heads not in get_args(StateHeads):
        raise CheckpointError(f"state_heads = {state_heads!r}: must be 'kv' or 'query'")
    raw = read_base_config(base)
    return {**raw, "lola_config": with_context_shift(parse_config(base, raw), config_overrides)}


def _identity_maps(
    prefix: str, dtype: torch.dtype, expected: Mapping[str, Shape]
) -> dict[str, torch.Tensor]:
    import torch

    if prefix + "feature_map_q" not in expected:  # a sliding layer
        return {}
    tensors = {}
    for kind in ("feature_map_q", "feature_map_k"):
        heads, d, F = expected[prefix + kind]
        # One copy per head: safetensors refuses tensors that share memory.
        tensors[prefix + kind] = torch.eye(d, F, dtype=dtype).repeat(heads, 1, 1)
    factors = expected[prefix + "window_factors"]
    tensors[prefix + "window_factors"] = torch.full(factors, WINDOW_FACTOR_INIT)
    return tensors
