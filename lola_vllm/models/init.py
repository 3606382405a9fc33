"""A LoLA checkpoint from a base: the same weights plus untrained feature maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from lola_vllm.core.config import DecoderConfig, TensorFacts
from lola_vllm.models.base import (
    parse_config,
    read_base_config,
    with_context_shift,
    write_checkpoint,
)
from lola_vllm.models.files import CheckpointError
from lola_vllm.models.staging import staged_directory

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

    The maps are LoLCATs' starting point, as `base.write_checkpoint` says.

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
    if state_heads not in get_args(StateHeads):
        raise CheckpointError(f"state_heads = {state_heads!r}: must be 'kv' or 'query'")
    raw = read_base_config(base)
    keys = with_context_shift(parse_config(base, raw), config_overrides)
    config_json = {**raw, "lola_config": keys}
    config = parse_config(base, config_json)
    heads = config.num_key_value_heads if state_heads == "kv" else config.num_attention_heads
    config.facts = TensorFacts(config.head_dim, heads)
    with staged_directory(out, force=force, inputs=[base]) as staging:
        write_checkpoint(base, staging, config_json, config, {})
    return config
