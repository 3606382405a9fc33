"""Tiny random decoders of many families, to be the bases of LoLA models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

# The four that vLLM's own Llama serves as LoLA models.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
# Others, by the feature that a Llama lacks, with fields that show it.
OTHERS: dict[str, dict[str, Any]] = {
    "apertus": {},  # norms of q and k, another feed-forward
    "arcee": {},  # a feed-forward of two matrices
    "cohere": {"logit_scale": 0.5},  # neighbours turn together, scaled logits, parallel blocks
    "ernie4_5": {},  # neighbours turn together
    "gemma": {},  # scaled embeddings
    "glm": {"rope_parameters": {"partial_rotary_factor": 0.5}},  # half of a head, neighbours
    "glm4": {"rope_parameters": {"partial_rotary_factor": 0.5}},  # and norms behind
    "granite": {  # multipliers everywhere, and a scale of attention
        "attention_multiplier": 0.1,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "granitemoe": {"num_local_experts": 4, "attention_multiplier": 0.1},  # experts
    "helium": {},  # neighbours turn together
    "mixtral": {"num_local_experts": 4},  # experts
    "olmo": {},  # LayerNorm without weights
    "olmo2": {},  # norms behind, and of q and k as a whole
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},  # experts
    "phi": {"rope_parameters": {"partial_rotary_factor": 0.5}},  # half of a head, LayerNorm
    "phi3": {"rope_parameters": {"partial_rotary_factor": 0.75}},  # one matrix for q, k and v
    "qwen3_moe": {  # experts, norms of q and k
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "seed_oss": {},  # biases
    "cohere2": {"sliding_window": 24, **SLIDING},  # sliding layers alone have RoPE
    "gemma3_text": {  # sliding layers with a RoPE of their own
        "sliding_window": 24,
        "query_pre_attn_scalar": 32,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 50_000.0},
        },
        **SLIDING,
    },
    "gpt_oss": {  # learned sinks, experts with biases, sliding layers, a table of half a head
        "sliding_window": 24,
        "num_local_experts": 4,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        **SLIDING,
    },
    "olmo3": {"sliding_window": 24, **SLIDING},  # sliding layers, norms of q and k
    "smollm3": {"no_rope_layers": [1, 0]},  # a layer without RoPE
    "stablelm": {"rope_parameters": {"partial_rotary_factor": 0.25}},  # a quarter of a head
    "starcoder2": {},  # LayerNorm and biases
}


def make_base(out: Path, family: str, **changes: Any) -> PreTrainedModel:
    """Write a stock model of two layers and return it; biases and norms are not the trivial ones.

    Heads have 16 numbers.
    """
    torch.manual_seed(0)
    fields = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "sliding_window": None,
    }
    own = dict(OTHERS.get(family, {}))
    rope = own.pop("rope_parameters", {})
    if "full_attention" not in rope:
        rope = {"rope_type": "default", "rope_theta": 50_000.0, **rope}
    kind = CONFIG_MAPPING[family]
    known = {key: x for key, x in fields.items() if key in kind.__dataclass_fields__}
    config = kind(**{**known, "rope_parameters": rope, **own, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.3)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("sinks"):
                parameter.normal_(1, 1)
            elif family in OTHERS and parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(out)
    return model
