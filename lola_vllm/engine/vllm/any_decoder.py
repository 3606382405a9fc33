"""LolaForCausalLM: any decoder that transformers has, through vLLM's Transformers backend.

The backend builds the decoder as transformers has it, replaces its linears, norms and embeddings by
vLLM's own, and asks one method for the class of its attention. That method gives LoLA's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import (
    TransformersForCausalLM,
    TransformersMoEForCausalLM,
)
from vllm.sequence import IntermediateTensors

from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.engine.vllm.attention import LolaAttention
from lola_vllm.engine.vllm.cache import lola_hf_config
from lola_vllm.engine.vllm.interface import HasLolaState, Named, load_strictly
from lola_vllm.models import rope
from lola_vllm.models.schema import is_ours


class LolaDecoderAttention(LolaAttention):
    """LoLA attention as vLLM's Transformers backend makes and calls attention.

    Raises:
        ValueError: the decoder asks for what LoLA's attention has not: a cap of logits, or another
            window than its config says.
    """

    def __init__(
        self,
        *,
        scale: float,
        prefix: str,
        logits_soft_cap: float | None = None,
        per_layer_sliding_window: int | None = None,
        sinks: Tensor | None = None,
        **_: Any,  # sizes, which the config says too, and vLLM's own caches
    ) -> None:
        super().__init__(prefix)
        window = self.layout.pages[0].ring_size if self.layout.slides else None
        for name, value, known in (
            ("attn_logit_softcapping", logits_soft_cap, None),
            ("sliding_window", per_layer_sliding_window, window),
        ):
            if value is not known and value != known:
                raise ValueError(f"{prefix}: {name} = {value!r}: LoLA attention has {known}")
        self.has_sink = sinks is not None  # vLLM's backend asks for it by this name
        self.sink_logits = sinks  # the decoder's own parameter, of this rank's heads
        own = self.head_dim**-0.5
        self.q_factor = None if scale == own else scale / own

    def attach(self, attention: nn.Module, rotary: nn.Module, order: rope.HeadOrder) -> None:
        """Take the order of a head's numbers, and RoPE, from the decoder itself.

        Args:
            attention: the decoder's own, whose heads come here. rotary: the decoder's RoPE, in host
                memory. order: of the heads.
        """
        self.has_rope = order.width > 0
        device = next(attention.parameters()).device
        places = None if order.order is None else order.order.to(device)
        self.register_buffer("order", places, persistent=False)
        self.decoder = attention, rotary, order  # together, or they would become parts of this one

    def rope_rows(self, positions: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `LolaAttention.rope_rows`, by the decoder's own function."""
        return rope.table(*self.decoder, self.head_dim, positions, dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `LolaAttention.forward`, of heads in the decoder's own order and scale."""
        if self.order is not None:
            q, k = (
                x.unflatten(-1, (-1, self.head_dim))[..., self.order].flatten(-2) for x in (q, k)
            )
        if self.q_factor is not None:
            q = q * self.q_factor
        return super().forward(q, k, v)


# vLLM's classes come behind this one.
_Base: Any = TransformersForCausalLM if TYPE_CHECKING else object


class _AnyDecoder(_Base):
    """What both classes below add to vLLM's Transformers backend."""

    vllm_config: VllmConfig
    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = lola_hf_config(vllm_config)
        self.schedule = ShiftSchedule.of(config)
        divisor = getattr(config, "logits_scaling", None)  # Granite's, which vLLM's backend leaves
        if divisor and self.pp_group.is_last_rank:
            self.logits_processor.scale = 1 / divisor
        rotary = rope.on_host(self.model.rotary_emb, self._from_config_kwargs["config"])
        layers = [
            module
            for module in self.model.modules()
            if isinstance(getattr(module, "attn", None), LolaDecoderAttention)
        ]
        orders = rope.head_orders(layers, rotary, config.head_dim)
        for module, order in zip(layers, orders, strict=True):
            module.attn.attach(module, rotary, order)

    @cached_property
    def _from_config_kwargs(self) -> dict[str, Any]:
        """vLLM's hook: what the decoder is built from, the base's own config."""
        config = lola_hf_config(self.vllm_config).base_config
        config._attn_implementation = "vllm"
        return {"config": config, "dtype": self.vllm_config.model_config.dtype}

    def _get_attn_cls(self) -> type[LolaDecoderAttention]:
        return LolaDecoderAttention

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """Run the decoder; its layers see RoPE positions below the trained length."""
        if self.schedule is not None:
            positions = self.schedule.rope_position(positions)
        hidden: Tensor | IntermediateTensors = super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )
        return hidden

    def load_weights(self, weights: Iterable[Named]) -> set[str]:
        """See `load_strictly`; LoLA's tensors belong to the module that vLLM attaches."""

        def load(good: Iterable[Named]) -> set[str]:
            loaded: set[str] = super(_AnyDecoder, self).load_weights(
                (_placed(name), tensor) for name, tensor in good
            )
            return loaded

        return load_strictly(self, load, weights, self.vllm_config)


def _placed(name: str) -> str:
    head, _, last = name.rpartition(".")
    return f"{head}.attn.{last}" if is_ours(name) else name


class LolaForCausalLM(_AnyDecoder, TransformersForCausalLM, HasLolaState):  # type: ignore[misc]
    """A LoLA model of any decoder."""


class LolaMoEForCausalLM(  # type: ignore[misc]
    _AnyDecoder, TransformersMoEForCausalLM, HasLolaState
):
    """A LoLA model of any decoder with experts."""

    def recursive_replace(self) -> None:
        """vLLM's hook: replace modules. It tells what experts compute by the architecture's name,
        which is LoLA's in the config."""
        own, base = self.config, self._from_config_kwargs["config"]
        base.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base.model_type]]
        self.config = base
        super().recursive_replace()
        self.config = own
