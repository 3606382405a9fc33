"""The families of base models: Llama, and decoders that differ from it by a bias or a norm.

A LoLA model is a Llama with two switches, `qkv_bias` and `qk_norm`. This module translates a base's
`config.json` to these switches. Weights keep the names that the families share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lola_vllm.checkpoint.files import CheckpointError

# Parts of every layer of a family that a plain Llama lacks.
_SWITCHES: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
BASE_MODEL_TYPES = tuple(_SWITCHES)
BASE_NAMES = "Llama, Mistral, Qwen2 or Qwen3"

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
            f"supported: {', '.join(BASE_MODEL_TYPES)}"
        )
    if family == "llama":
        return raw
    own = _own_config(path, raw)
    _refuse_windows(path, raw, own)
    kept = {key: value for key, value in raw.items() if key not in _WINDOWS}
    unstated = [key for key in _DEFAULTED if key not in kept and hasattr(own, key)]
    return {**kept, **{key: getattr(own, key) for key in unstated}, **_SWITCHES[family]}


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
