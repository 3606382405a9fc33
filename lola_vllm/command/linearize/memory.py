"""What training takes in memory, about: numbers of a base and activations of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lola_vllm.core.config import LolaLlamaConfig

if TYPE_CHECKING:
    from lola_vllm.command.linearize.recipe import Recipe


def parameters(config: LolaLlamaConfig) -> int:
    """Of the base."""
    d, D = int(config.head_dim or 0), config.hidden_size
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    attention = 2 * D * d * (config.num_attention_heads + kv_heads)
    layer = attention + 3 * D * config.intermediate_size
    embeddings = config.vocab_size * D * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * layer + embeddings


def activation_bytes(config: LolaLlamaConfig, recipe: Recipe, *, whole: bool) -> int:
    """What the gradient of the longest row of stage 2 needs, about.

    Args:
        whole: all layers at once, or one and the inputs of the others (gradient checkpointing).
    """
    d, D, layers = int(config.head_dim or 0), config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    width = 2 if recipe.dtype == "bfloat16" else 4
    plain = (8 * D + 4 * config.intermediate_size + 4 * heads * d) * width
    found = 0
    for length, exact, interval in (
        (recipe.lora_last_row_length, max(recipe.train_sparse_caches), recipe.window_size),
        (recipe.on_row_length, recipe.pairs, recipe.update_interval),
    ):
        seen = min(length, exact + 2 * recipe.window_size)
        listed = 16 * kv_heads * seen / interval  # where the pairs of each chunk are, int64
        # Queries, keys, values, features and answers in float32, and H of each chunk.
        features = 56 * d * (heads + kv_heads) + 16 * d * d * kv_heads / interval
        token = plain + listed + features
        kept = layers * token if whole else token + layers * D * width
        found = max(found, int(length * kept))
    return found
