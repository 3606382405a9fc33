"""Tiny random LoLA checkpoints, written by hand from the documented format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lola_vllm.core.lola_config import importance_size

VOCAB = 500


def make_tiny(
    out: Path,
    lola_config: dict[str, Any],
    *,
    state_heads: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 2,
    importance: bool = False,
    max_position_embeddings: int = 4096,
    seed: int = 0,
) -> Path:
    """Hidden 64, F 8; random feature maps that are not the identity."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.15,  # distinct logits: greedy choices with a margin above rounding
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    tensors = LlamaForCausalLM(config).state_dict()
    for i in range(layers):
        attn = f"model.layers.{i}.self_attn"
        tensors[f"{attn}.feature_map_q"] = torch.randn(heads, head_dim, 8) * 0.4
        tensors[f"{attn}.feature_map_k"] = torch.randn(state_heads, head_dim, 8) * 0.4
        tensors[f"{attn}.window_factors"] = torch.randn(heads)
        if importance:
            tensors[f"{attn}.importance"] = torch.randn(kv_heads, importance_size(head_dim)) * 0.3
    out.mkdir(parents=True, exist_ok=True)
    fields = config.to_dict() | {
        "model_type": "lola",
        "base_model_type": "llama",
        "architectures": ["LolaLlamaForCausalLM"],
        "lola_config": lola_config,
    }
    (out / "config.json").write_text(json.dumps(fields, indent=1))
    save_file(tensors, out / "model.safetensors")
    return out


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts of random token ids."""
    gen = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=gen).tolist() for n in lengths]
