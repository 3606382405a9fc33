"""Tiny random models of each family that LoLA takes as a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

_CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
FAMILIES = tuple(_CONFIGS)


def make_base(out: Path, family: str, **changes: Any) -> PreTrainedModel:
    """Write a stock model of two layers and return it; biases and norms are not the trivial ones.

    `head_dim` is 16 (Qwen2 has no such field: there it is hidden size / heads, 16 too).
    """
    torch.manual_seed(0)
    fields = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
        "bos_token_id": None,
        "eos_token_id": None,
        "sliding_window": None,
    }
    if family != "qwen2":
        fields["head_dim"] = 16
    if family == "llama":
        del fields["sliding_window"]
    config = _CONFIGS[family](**{**fields, **changes})
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.3)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(out)
    return model
