"""Which decoders can be a base: what LoLA asks of one, looked for in the decoder itself.

No family is named here. A decoder is built without weights, as its `config.json` says, and its
layers are looked at.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lola_vllm.models.files import CheckpointError

BASE_NAMES = "decoder of transformers with full attention"


def check_base(path: Path, raw: dict[str, Any]) -> None:
    """Whether LoLA can stand in for the attention of a decoder.

    Args:
        path: of its `config.json`, for messages. raw: the content.

    Raises:
        CheckpointError: it cannot; says why in a sentence, and what works.
    """
    reason = _why_not(path, raw)
    if reason is not None:
        raise CheckpointError(
            f"{path}: a model of type {raw.get('model_type')!r} cannot be the base of a LoLA "
            f"model: {reason}"
        )


def _why_not(path: Path, raw: dict[str, Any]) -> str | None:
    """Why LoLA cannot stand in for a decoder's attention, with what works; None: it can."""
    from transformers import CONFIG_MAPPING

    from lola_vllm.core.model_types import LLAMA_TYPES, LOLA_TYPES

    kind = raw.get("model_type")
    if not isinstance(kind, str):
        return "config.json has no model_type; give the directory of a model in Hugging Face's form"
    if kind in LOLA_TYPES:
        return "it is a LoLA model already; the base that it was made of works"
    if kind not in CONFIG_MAPPING:
        return "the installed transformers knows no such model; a newer one may"
    config = _own_config(path, raw)
    return _of_config(config) or (None if kind in LLAMA_TYPES else _of_layers(config))


def _own_config(path: Path, raw: dict[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    from lola_vllm.core.model_types import explain_field

    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {explain_field(error)}") from error


def _of_config(config: Any) -> str | None:
    from lola_vllm.core.model_types import FULL_ATTENTION, SLIDING_ATTENTION, windows_of

    if config.get_text_config() is not config:
        return "it reads more than text; a model of its text_config alone may work"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder, and LoLA needs a decoder alone"
    if getattr(config, "kv_lora_rank", None):
        return (
            "its heads share compressed keys and values (latent attention), and LoLA keeps pairs "
            "of each head"
        )
    if getattr(config, "num_kv_shared_layers", None):
        return "some of its layers use the keys and values of others, and LoLA's state is per layer"
    types = set(getattr(config, "layer_types", None) or ())
    if all(windows_of(config)):
        return (
            f"all its layers see a window only (sliding_window = {config.sliding_window}), so its "
            "memory does not grow; switch that off in its config.json (sliding_window to null, or "
            "use_sliding_window to false) if it was trained without"
        )
    if types - {FULL_ATTENTION, SLIDING_ATTENTION}:
        return (
            f"its layers are {', '.join(sorted(types))}, and LoLA stands in for softmax attention "
            "over all tokens"
        )
    if getattr(config, "attn_logit_softcapping", None):
        return (
            f"attn_logit_softcapping = {config.attn_logit_softcapping} caps the logits of its "
            "attention, and LoLA's have no cap"
        )
    return None


def _of_layers(config: Any) -> str | None:
    import torch
    from transformers import AutoModelForCausalLM

    other = "its layers are no decoder layers with attention at model.layers[i].self_attn"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        attentions = [layer.self_attn for layer in model.model.layers]
    except (AttributeError, ValueError):
        return other
    rotary = getattr(model.model, "rotary_emb", None)
    for attention in attentions:
        if not hasattr(
            attention, "layer_idx"
        ) or "ALL_ATTENTION_FUNCTIONS" not in inspect.getsource(type(attention).forward):
            return other
        if rotary is None or not hasattr(
            inspect.getmodule(type(attention)), "apply_rotary_pos_emb"
        ):
            return "it has no RoPE, by which LoLA moves keys when contexts shift"
    return None
