"""What training takes in memory, about: numbers of a base and activations of a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lola_vllm.core.config import DecoderConfig


class TrainedRow(NamedTuple):
    """A row of stage 2: its tokens, the exact pairs of a query outside the window, and the tokens
    from one update to the next."""

    length: int
    exact: int
    interval: int


def parameters(config: DecoderConfig) -> int:
    """Of the base."""
    d, D = int(config.head_dim or 0), config.hidden_size
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    attention = 2 * D * d * (config.num_attention_heads + kv_heads)
    layer = attention + 3 * D * config.intermediate_size
    embeddings = config.vocab_size * D * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * layer + embeddings


def activation_bytes(
    config: DecoderConfig, rows: Iterable[TrainedRow], *, window: int, width: int, whole: bool
) -> int:
    """What the gradient of the largest row needs, about.

    Args:
        window: tokens. width: bytes of a number of the base.
        whole: all layers at once, or one and the inputs of the others (gradient checkpointing).
    """
    d, D, layers = int(config.head_dim or 0), config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    plain = (8 * D + 4 * config.intermediate_size + 4 * heads * d) * width
    found = 0
    for length, exact, interval in rows:
        seen = min(length, exact + 2 * window)
        listed = 16 * kv_heads * seen / interval  # where the pairs of each chunk are, int64
        # Queries, keys, values, features and answers in float32, and H of each chunk.
        features = 56 * d * (heads + kv_heads) + 16 * d * d * kv_heads / interval
        token = plain + listed + features
        kept = layers * token if whole else token + layers * D * width
        found = max(found, int(length * kept))
    return found
