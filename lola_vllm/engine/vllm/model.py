"""LolaLlamaForCausalLM: vLLM's own Llama with its attention swapped for LoLA's.

It serves what `any_decoder.py` serves too, for the four families that are Llamas but for a bias or
a norm: an eager decode step takes less time than through transformers' modules.

Embedding, MLP, norms, head, tensor and pipeline parallelism, LoRA and quantized linears are
vLLM's own. The class and its flags stay in this file: vLLM caches what it learns of a model by
the hash of the file that is named at registration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from vllm.sequence import IntermediateTensors

from lola_vllm.core.config import DecoderConfig
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.engine.vllm import compat
from lola_vllm.engine.vllm.attention import LolaAttention
from lola_vllm.engine.vllm.interface import HasLolaState, Named, load_strictly


class LolaLlamaAttention(LolaAttention):
    """LoLA attention with the projections and the interface of vLLM's `LlamaAttention`.

    Parameters beside LoLA's: `qkv_proj`, `o_proj`; `q_norm` and `k_norm` where the config has
    `qk_norm`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int = 8192,
        quant_config: QuantizationConfig | None = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        prefix: str = "",
        **_: Any,  # cache_config and attn_type: vLLM's own caches, which this layer has none of
    ) -> None:
        super().__init__(prefix)
        self.qkv_proj = QKVParallelLinear(
            hidden_size=hidden_size,
            head_size=self.head_dim,
            total_num_heads=num_heads,
            total_num_kv_heads=num_kv_heads,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            input_size=num_heads * self.head_dim,
            output_size=hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=max_position_embeddings,
            rope_parameters=getattr(config, "rope_parameters", None),
            is_neox_style=True,
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """positions `[T]`, hidden_states `[T, hidden_size]` -> `[T, hidden_size]`."""
        qkv, _ = self.qkv_proj(hidden_states)
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
        if self.qk_norm:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(super().forward(q, k, v))
        return output

    def rope_rows(self, positions: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `LolaAttention.rope_rows`, from vLLM's own table."""
        cos, sin = compat.rope_rows(self.rotary_emb, tuple(positions)).to(dtype).chunk(2, dim=-1)
        return cos, sin


class LolaDecoderLayer(LlamaDecoderLayer):
    """A Llama layer with LoLA attention."""

    def __init__(
        self, vllm_config: VllmConfig, prefix: str = "", config: DecoderConfig | None = None
    ) -> None:
        llama = cast(LlamaConfig, config)  # one of the four that vLLM's Llama takes
        super().__init__(vllm_config, prefix, llama, attn_layer_type=LolaLlamaAttention)


class LolaLlamaModel(LlamaModel):
    """A Llama decoder whose layers see RoPE positions below the trained length."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        layer_type: type[nn.Module] = LolaDecoderLayer,
    ) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        self.schedule = ShiftSchedule.of(cast(DecoderConfig, self.config))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
        **extra_layer_kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        """Run `LlamaModel.forward`; compiled with it."""
        if self.schedule is not None:
            positions = self.schedule.rope_position(positions)
        return super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, **extra_layer_kwargs
        )


class LolaLlamaForCausalLM(LlamaForCausalLM, HasLolaState):
    """A LoLA model whose base is a Llama but for biases of q, k, v or for norms of q and k."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LolaDecoderLayer)
        self.vllm_config = vllm_config

    def _init_model(
        self,
        vllm_config: VllmConfig,
        prefix: str = "",
        layer_type: type[nn.Module] = LolaDecoderLayer,
    ) -> LolaLlamaModel:
        return LolaLlamaModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights: Iterable[Named]) -> set[str]:
        """See `load_strictly`."""
        return load_strictly(self, super().load_weights, weights, self.vllm_config)
