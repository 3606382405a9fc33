"""The pages of a model's layers, from its config."""

from __future__ import annotations

import torch

from lola_vllm.core.config import DecoderConfig
from lola_vllm.core.state import LayerLayout


def layer_layout(
    config: DecoderConfig, index: int, kv_dtype: torch.dtype, ranks: int = 1, rank: int = 0
) -> LayerLayout:
    """The pages of a layer on one of so many tensor-parallel ranks.

    Args:
        kv_dtype: of keys and values.
    """
    lola, facts = config.for_layer(index)
    kv_heads = config.num_key_value_heads
    return LayerLayout.from_config(
        lola,
        num_kv_heads=max(1, kv_heads // ranks),
        num_state_heads=max(1, facts.num_state_heads // ranks),
        head_dim=config.head_dim,
        feature_dim=facts.feature_dim,
        kv_dtype=kv_dtype,
        importance=facts.importance,
        first_kv_head=rank * kv_heads // ranks,
    )


def layer_layouts(
    config: DecoderConfig, kv_dtype: torch.dtype, ranks: int = 1, rank: int = 0
) -> tuple[LayerLayout, ...]:
    """`layer_layout` of every layer."""
    layers = range(config.num_hidden_layers)
    return tuple(layer_layout(config, index, kv_dtype, ranks, rank) for index in layers)
