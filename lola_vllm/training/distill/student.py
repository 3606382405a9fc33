"""A Hugging Face decoder with LoLA attention for training: its own weights plus feature maps.

The attention is swapped through transformers' registry of attention functions. So projections,
RoPE, biases and q/k norms stay those of the model, and this code is the same for all families.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import sliding
from lola_vllm.core.ops.differentiable import lola_attention_parallel
from lola_vllm.engine.hf.attention import in_form, order_heads
from lola_vllm.models.base import read_base_config
from lola_vllm.models.schema import OUTPUT_PROJECTIONS

ATTENTION = "lola_training"
MAP_NAMES = ("feature_map_q", "feature_map_k", "window_factors")


def load_base(path: Path, dtype: torch.dtype) -> Any:
    """Load a base model for distillation, its weights frozen.

    Args:
        path: a local Hugging Face directory of a decoder (`models/families.py`).
        dtype: of the weights.

    Raises:
        CheckpointError: no such directory, or a decoder that cannot be a base.
    """
    import transformers

    read_base_config(path)  # refuses models that could not be served afterwards
    transformers.AttentionInterface.register(ATTENTION, _attention)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=ATTENTION
    )
    model.requires_grad_(False)
    order_heads(model)
    model.config.use_cache = False
    return model.eval()


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a model, also inside a PEFT wrapper."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(base.model.layers)


def attach_maps(model: Any, num_state_heads: int, feature_dim: int | None = None) -> None:
    """Give every layer a starting point: LoLCATs' identity maps, and logits of window factors of 0.
    Sliding layers have no maps.

    They become float32 parameters of `self_attn`: `feature_map_q [Hq, d, F]`,
    `feature_map_k [Hs, d, F]` and `window_factors [Hq]`.
    """
    config = model.config
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    F = feature_dim or d
    for layer in decoder_layers(model):
        attention = layer.self_attn
        attention.lola_config = None
        if attention.lola_window is not None:
            continue
        device = next(attention.parameters()).device
        for name, heads in (
            ("feature_map_q", config.num_attention_heads),
            ("feature_map_k", num_state_heads),
        ):
            eye = torch.eye(d, F, device=device).repeat(heads, 1, 1)
            attention.register_parameter(name, nn.Parameter(eye, requires_grad=False))
        # 0.5 after the sigmoid: heads end anywhere between 0 and 1, as far from either end.
        factors = torch.zeros(config.num_attention_heads, device=device)
        attention.register_parameter("window_factors", nn.Parameter(factors, requires_grad=False))
        attention.register_buffer("importance", None, persistent=False)


def output_projection(attention: Any) -> Tensor:
    """The weight of an attention's output projection, whatever the family calls it."""
    name = next(name for name in OUTPUT_PROJECTIONS if hasattr(attention, name))
    weight: Tensor = getattr(attention, name).weight
    return weight


def layer_maps(layer: Any) -> dict[str, nn.Parameter]:
    """The three trainable tensors of a layer, by name; none of a sliding one."""
    if layer.self_attn.lola_window is not None:
        return {}
    return {name: getattr(layer.self_attn, name) for name in MAP_NAMES}


def map_groups(
    layers: Iterable[Any], learning_rate: float, window_factor_rate: float
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the feature maps of some layers, and their window factors.

    Adam's step is about the learning rate whatever the gradient is. An entry of a feature map has
    hundredths to go, the logit of a window factor several units, so it has larger steps.

    Args:
        learning_rate: of the feature maps.
        window_factor_rate: times that is the learning rate of the window factors.
    """
    maps, factors = [], []
    for of_layer in filter(None, map(layer_maps, layers)):
        *both, own_factors = of_layer.values()
        maps += both
        factors.append(own_factors)
    return [
        {"params": maps, "lr": learning_rate},
        {"params": factors, "lr": learning_rate * window_factor_rate},
    ]


def scale_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's learning rate to this share of the one that it began with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * share


def all_maps(model: Any) -> dict[str, Tensor]:
    """Copies of every layer's maps under the names of a LoLA checkpoint."""
    return {
        f"model.layers.{i}.self_attn.{name}": value.detach().cpu().clone()
        for i, layer in enumerate(decoder_layers(model))
        for name, value in layer_maps(layer).items()
    }


@torch.no_grad()
def load_maps(model: Any, tensors: dict[str, Tensor]) -> None:
    """Copy maps that `all_maps` saved back into a model; layers that are not there stay."""
    for i, layer in enumerate(decoder_layers(model)):
        for name, value in layer_maps(layer).items():
            saved = tensors.get(f"model.layers.{i}.self_attn.{name}")
            if saved is not None:
                value.copy_(saved)


def load_importance(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give layers their importance, by the names that it has in a checkpoint. It is not trained."""
    for i, layer in enumerate(decoder_layers(model)):
        weights = tensors.get(f"model.layers.{i}.self_attn.importance")
        if weights is not None:
            layer.self_attn.importance = weights.to(layer.self_attn.feature_map_q.device)


@contextmanager
def lola_attention(model: Any, config: LolaConfig) -> Iterator[None]:
    """Within this context the model uses LoLA attention, outside softmax attention."""
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        layer.self_attn.lola_config = config.for_layer(index)
    try:
        yield
    finally:
        for layer in layers:
            layer.self_attn.lola_config = None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: `[B, H, T, d]` in, `[B, T, Hq, d]` out.

    Rows are whole sequences without padding, so there is no mask to look at.
    """
    query, key = in_form(module, query, key, scaling)
    if module.lola_window is not None:
        out = sliding.attend(query, key, value, module.lola_window, None, s_aux)
        return out.transpose(1, 2), None
    if module.lola_config is None:
        out = sliding.causal(query, key, value, None, s_aux).transpose(1, 2)
        if getattr(module, "capture", None) is not None:
            module.capture[:] = [x.transpose(1, 2) for x in (query, key, value)] + [out, s_aux]
        return out, None
    out = lola_attention_parallel(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        module.feature_map_q,
        module.feature_map_k,
        module.window_factors,
        module.lola_config,
        importance=module.importance,
        sink_logits=s_aux,
    )
    return out, None
