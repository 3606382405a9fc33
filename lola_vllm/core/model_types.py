"""Types of models, by the names in `config.json`, and what a base's config says of its layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "lola"
OLD_MODEL_TYPE = "lola_llama"  # of before other decoders; files load as they are
LOLA_TYPES = (MODEL_TYPE, OLD_MODEL_TYPE)
# vLLM's classes: any decoder, one with experts, and the four that vLLM's own Llama runs.
ARCHITECTURE, MOE_ARCHITECTURE = "LolaForCausalLM", "LolaMoEForCausalLM"
LLAMA_ARCHITECTURE = "LolaLlamaForCausalLM"
ARCHITECTURES = {  # and the modules of `engine/vllm` that have them
    ARCHITECTURE: "any_decoder",
    MOE_ARCHITECTURE: "any_decoder",
    LLAMA_ARCHITECTURE: "model",
}
LLAMA_TYPES = ("llama", "mistral", "qwen2", "qwen3")
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"  # in `layer_types`


def windows_of(config: Any) -> tuple[int | None, ...]:
    """`DecoderConfig.windows` of a decoder's config, a base's or a LoLA model's."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not types:
        return (window or None,) * config.num_hidden_layers
    return tuple(window if kind == SLIDING_ATTENTION else None for kind in types)


def architecture_of(config: Any, base_model_type: str) -> str:
    """The name of vLLM's class for a base, by the base's config or by that of its LoLA model."""
    if base_model_type in LLAMA_TYPES and not any(windows_of(config)):
        return LLAMA_ARCHITECTURE
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    return MOE_ARCHITECTURE if any(getattr(config, x, None) for x in experts) else ARCHITECTURE


def base_type_of(raw: Mapping[str, Any]) -> str:
    """The base's model type that a LoLA model's `config.json` names.

    Files of before other decoders than these had switches, and the model type "lola_llama".
    """
    if raw.get("model_type") == OLD_MODEL_TYPE:
        bias = raw.get("qkv_bias") and not raw.get("attention_bias")
        return "qwen3" if raw.get("qk_norm") else "qwen2" if bias else "llama"
    return str(raw.get("base_model_type"))


def explain_field(error: Exception) -> str:
    """What transformers says of a field of `config.json`: its name, its value, and its type."""
    found = re.search(r"Field '(\w+)' expected (.+), got \w+ \(value: (.+)\)", str(error))
    return f"{found[1]} = {found[3]}: must be of type {found[2]}" if found else str(error)
