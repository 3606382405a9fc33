"""The attention function of transformers' registry that LoLA models name: `"lola"`.

A decoder's projections, norms, RoPE and biases stay its own. From there on decoders differ in the
order of the numbers of a head and in the scale of the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.model_types import windows_of
from lola_vllm.core.ops import LolaWeights, sliding
from lola_vllm.core.ops.differentiable import lola_attention_parallel
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.engine.hf.tokens import LolaModelError, NewTokens
from lola_vllm.models import rope

if TYPE_CHECKING:
    from lola_vllm.engine.hf.cache import LolaCache

ATTENTION = "lola"


class Forward(NamedTuple):
    """What every layer's attention gets in one forward.

    Attributes:
        tokens: which columns are tokens. cache: None where whole sequences are read.
        rotations: of a context shift, by layer; None where contexts do not shift.
    """

    tokens: NewTokens
    cache: LolaCache | None
    rotations: tuple[KeyRotation, ...] | None


def attentions(model: Any) -> list[Any]:
    """The attention of each layer of a decoder, `model.model.layers[i].self_attn`."""
    return [layer.self_attn for layer in model.model.layers]


def order_heads(model: Any) -> None:
    """Find out how each layer of a decoder turns its heads, as `in_form` needs it.

    Adds `lola_order` to each attention, `lola_window`, the tokens that a sliding layer sees (None
    for others), and `lola_number`, which it is of those that do not slide.
    """
    layers = attentions(model)
    rotary = rope.on_host(model.model.rotary_emb, model.config)
    orders = rope.head_orders(layers, rotary, layers[0].head_dim)
    number = 0
    for attention, order, window in zip(layers, orders, windows_of(model.config), strict=True):
        attention.lola_order, attention.lola_window = order, window
        attention.lola_number = number
        number += window is None


def in_form(module: Any, q: Tensor, k: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
    """q and k `[..., d]` of a layer as LoLA's ops take them: numbers in order, and logits of
    `q k / sqrt(d)`.

    Args:
        scaling: of the decoder's own logits; None: 1 / sqrt(d).
    """
    q, k = module.lola_order(q), module.lola_order(k)
    own = q.shape[-1] ** -0.5
    return (q if scaling in (None, own) else q * (scaling / own)), k


def lola_weights(
    module: Any,
    lola: LolaConfig,
    rotation: KeyRotation | None,
    sink_logits: Tensor | None = None,
) -> LolaWeights:
    """A layer's weights as ops take them, without gradients.

    Args:
        sink_logits: `[Hq]`, of the decoder's learned sinks; None: it has none.
    """
    if sink_logits is not None:
        sink_logits = sink_logits.detach()
    if module.lola_window is not None:
        config = module.config
        sizes = config.num_attention_heads, config.num_key_value_heads, module.head_dim
        return LolaWeights.of_window(
            *sizes, lola.mixing, next(module.parameters()), rotation, sink_logits
        )
    importance = module.importance
    return LolaWeights.prepare(
        module.feature_map_q.detach(),
        module.feature_map_k.detach(),
        module.window_factors.detach(),
        lola.mixing,
        module.config.num_key_value_heads,
        None if importance is None else importance.detach(),
        rotation,
        sink_logits,
    )


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    *,
    lola: Forward | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """LoLA attention of a layer: `[B, H, Q, d]` in, `[B, Q, Hq, d]` out, and no weights.

    `lola` says which columns are tokens; `mask` is not looked at. Decoders whose layers do not pass
    it on (StableLM's) have it in `module.lola_forward`. `s_aux` are the logits of learned sinks.
    """
    lola = lola or module.lola_forward[0]
    assert lola is not None
    query, key = in_form(module, query, key, scaling)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if lola.cache is None:
        return _attend_whole(module, q, k, v, lola.tokens, s_aux), None
    index = module.layer_idx
    layer = lola.cache.layers[index]
    rotation = None if lola.rotations is None else lola.rotations[index]
    attended = layer.attend(q, k, v, lola_weights(module, layer.lola, rotation, s_aux), lola.tokens)
    if torch.is_grad_enabled() and q.requires_grad:
        attended = _NoGradient.apply(attended, q)
    return attended, None


def _attend_whole(
    module: Any, q: Tensor, k: Tensor, v: Tensor, tokens: NewTokens, sink_logits: Tensor | None
) -> Tensor:
    """Attention over whole sequences, with gradients. Padding is moved behind the tokens."""
    dropout = getattr(module, "attention_dropout", 0)
    if module.training and dropout:
        raise LolaModelError(f"attention_dropout = {dropout}: LoLA has none; set it to 0")
    order = tokens.tokens_first(q.device)
    if order is not None:
        q, k, v = (_columns(x, order) for x in (q, k, v))
    if module.lola_window is not None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = sliding.attend(q, k, v, module.lola_window, None, sink_logits).transpose(1, 2)
    else:
        lola, _ = module.config.for_layer(module.layer_idx)
        weights = (module.feature_map_q, module.feature_map_k, module.window_factors)
        out = lola_attention_parallel(
            q, k, v, *weights, lola, importance=module.importance, sink_logits=sink_logits
        )
    return out if order is None else _columns(out, order.argsort(1))


def _columns(x: Tensor, order: Tensor) -> Tensor:
    """x `[B, Q, H, d]` with its columns in the order `[B, Q]`."""
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


class _NoGradient(torch.autograd.Function):
    """Passes on the output of attention over a cache, and refuses a backward pass: gradients
    without the attention's part would silently be wrong."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, q: Tensor) -> Tensor:
        return attended.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise LolaModelError("no gradients flow through a LolaCache; train with use_cache=False")


AttentionInterface.register(ATTENTION, attention)
