"""The families of base models: Llama, and decoders that differ from it by a bias or a norm.

A LoLA model is a Llama with two switches, `qkv_bias` and `qk_norm`. This module translates a base's
`config.json` to these switches. Weights keep the names that the families share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lola_vllm.models.files import CheckpointError

# Parts of every layer of a family that a plain Llama lacks.
_SWITCHES: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
BASE_MODEL_TYPES = tuple(_SWITCHES)
BASE_NAMES = "Llama, Mistral, Qwen2 or Qwen3"

_DENSE = "a dense Qwen3 of about its size works"
_SMALL = "SmolLM2, which is a Llama, works"
# Of which model types, as regular expressions: why not, and what is nearest to it. The first that
# matches counts.
_REFUSED = (
    (r"lola_llama", "it is a LoLA model already; the base that it was made of works"),
    (
        r"gemma\d?n?(_text)?|vaultgemma|gemma4_.*",
        "Gemma scales its embeddings and has norms and layers of its own, from Gemma 2 on with "
        f"sliding windows too; {_DENSE}",
    ),
    (
        r"(falcon_)?mamba2?|rwkv|xlstm|jamba|bamba|zamba2?|falcon_h1|nemotron_h|recurrent_gemma|"
        r"granitemoehybrid|qwen3_next|qwen3_5(_moe)?(_text)?|lfm2(_moe)?|minimax|kimi_linear|"
        r"olmo_hybrid",
        "some or all of its layers are recurrent already, and LoLA stands in for softmax "
        f"attention; {_DENSE}",
    ),
    (
        r"deepseek_v\d+|minicpm3|glm4_moe_lite",
        "its heads share compressed keys and values (latent attention), and LoLA keeps pairs of "
        f"each head; {_DENSE}",
    ),
    (
        r".*moe.*|mixtral|gpt_oss|dbrx|llama4(_text)?|minimax_m2|switch_transformers",
        f"its layers choose among experts, and those of a Llama have one feed-forward; {_DENSE}",
    ),
    (
        r"phi3|glm4?",
        "its layers keep several matrices in one tensor, and RoPE may turn a part of a head only; "
        f"{_DENSE}",
    ),
    (
        r"phi|gpt_neox|gptj|codegen|falcon|cohere2?|stablelm|persimmon|starcoder2|nemotron|olmo",
        f"it has LayerNorm where a Llama has RMSNorm; {_DENSE}",
    ),
    (
        r"gpt2|gpt_bigcode|gpt_neo|opt|biogpt|xglm|bloom|mpt",
        f"it has no RoPE, and a Llama's layers turn keys by it; {_SMALL}",
    ),
    (
        r"olmo[23]|exaone4",
        f"its norms come after attention and feed-forward, and a Llama's before; {_DENSE}",
    ),
    (
        r"granite",
        f"it scales embeddings, attention, residuals and logits by factors of its own; {_DENSE}",
    ),
    (r"smollm3", f"some of its layers have no RoPE; {_SMALL}"),
)

# Defaults of these differ between the families, and a file need not state a default.
_DEFAULTED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
# Fields that say which layers of the base attend to a window only. No layer may, and vLLM would use
# a window if the fields stayed in the config.
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


def llama_fields(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """A base's `config.json` with the fields of `LolaLlamaConfig`; `model_type` is left as it is.

    Args:
        path: the file, for messages.
        raw: its content; fields that both configs have are kept as they are written.

    Raises:
        CheckpointError: a family that is not supported, fields that its own config refuses, or
            layers with a sliding window.
    """
    family = raw.get("model_type")
    if family not in _SWITCHES:
        raise CheckpointError(
            f"{path}: model_type {family!r} is not supported; "
            f"supported: {', '.join(BASE_MODEL_TYPES)}. {why_not(raw)}"
        )
    if family == "llama":
        return raw
    own = _own_config(path, raw)
    _refuse_windows(path, raw, own)
    kept = {key: value for key, value in raw.items() if key not in _WINDOWS}
    unstated = [key for key in _DEFAULTED if key not in kept and hasattr(own, key)]
    return {**kept, **{key: getattr(own, key) for key in unstated}, **_SWITCHES[family]}


def why_not(raw: Mapping[str, Any]) -> str:
    """One sentence on why a base is refused, with what is nearest to it."""
    family = raw.get("model_type")
    if not isinstance(family, str):
        return (
            "config.json has no model_type: give the directory of a model in Hugging Face's form."
        )
    for types, why in _REFUSED:
        if re.fullmatch(types, family):
            return f"The reason: {why}."
    if {"vision_config", "audio_config"} & set(raw):
        return (
            "The reason: it reads more than text; the text model that it was made of works, if it "
            f"is a {BASE_NAMES}."
        )
    if raw.get("is_encoder_decoder"):
        return f"The reason: it has an encoder, and a Llama is a decoder alone; {_DENSE}."
    return (
        f"The reason: its layers are not known to be a Llama's but for a bias or a norm; {_DENSE}."
    )


def _own_config(path: Path, raw: dict[str, Any]) -> Any:
    """`raw` as its family's own config, which fills in the family's defaults."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _refuse_windows(path: Path, raw: dict[str, Any], own: Any) -> None:
    """Raise if a layer of the base attends to a sliding window."""
    window = getattr(own, "sliding_window", None)  # None where Qwen's switch is off
    types = getattr(own, "layer_types", None)  # None for Mistral, whose window is in every layer
    if (window is None) if types is None else (set(types) == {"full_attention"}):
        return
    default = " (the default)" if types is None and "sliding_window" not in raw else ""
    switch = "sliding_window to null" if types is None else "use_sliding_window to false"
    raise CheckpointError(
        f"{path}: sliding_window = {window!r}{default}: layers of this base see a window only, and "
        "LoLA stands in for full attention; use a base without sliding windows, or set "
        f"{switch} there if it was trained without"
    )
