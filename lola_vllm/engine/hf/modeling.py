"""The LoLA model for transformers: its Llama with the attention swapped."""

# No `from __future__ import annotations`: transformers reads the class of `config` from its
# annotation.

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from lola_vllm.core.config import LolaLlamaConfig, importance_size
from lola_vllm.core.ops import LolaWeights
from lola_vllm.core.ops.compose import Composer
from lola_vllm.core.ops.differentiable import lola_attention_parallel
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.rope_table import RopeTable
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import SequenceLayout
from lola_vllm.engine.hf.cache import LolaCache
from lola_vllm.engine.hf.tokens import LolaModelError, NewTokens
from lola_vllm.models.remote_code import AUTO_MAP, write_remote_code
from lola_vllm.models.schema import WINDOW_FACTOR_INIT, settle_facts


class LolaLlamaAttention(LlamaAttention):
    """Llama's projections and RoPE around LoLA's attention.

    Parameters beside Llama's: `feature_map_q [Hq, d, F]`, `feature_map_k [Hs, d, F]` and
    `window_factors [Hq]` (before the sigmoid); `q_norm` and `k_norm` where the config has
    `qk_norm`; `importance [Hkv, d // 2 + d + 1]` (float32, no gradient) where the checkpoint
    has it, else None.
    """

    def __init__(self, config: LolaLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        config.check_sizes()
        self.lola = config.lola.for_layer(layer_idx)
        hidden, d, heads = config.hidden_size, self.head_dim, config.num_attention_heads
        if config.qkv_bias != config.attention_bias:
            for projection in ("q_proj", "k_proj", "v_proj"):
                size = getattr(self, projection).out_features
                setattr(self, projection, nn.Linear(hidden, size, bias=config.qkv_bias))
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(d, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(d, eps=config.rms_norm_eps)
        facts = config.facts
        self.feature_map_q = nn.Parameter(torch.empty(heads, d, facts.feature_dim))
        maps_k = torch.empty(facts.num_state_heads, d, facts.feature_dim)
        self.feature_map_k = nn.Parameter(maps_k)
        self.window_factors = nn.Parameter(torch.empty(heads))
        self.importance: nn.Parameter | None = None
        if facts.importance:
            kv_heads = self.v_proj.out_features // d
            self.importance = nn.Parameter(torch.empty(kv_heads, importance_size(d)))

    def forward(  # type: ignore[override]  # called by LolaLlamaModel's layers only
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: LolaCache | None = None,
        *,
        new_tokens: NewTokens,
        rotation: KeyRotation | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states `[B, Q, hidden]` -> the same, and no attention weights.

        `new_tokens` says which columns are padding; `attention_mask` is ignored. `rotation` is of
        context shifts.
        """
        q, k, v = self.qkv(hidden_states, position_embeddings)
        if past_key_values is None:
            attended = self._attend_whole(q, k, v, new_tokens)
        else:
            layer = past_key_values.layers[self.layer_idx]
            attended = layer.attend(q, k, v, self.lola_weights(rotation), new_tokens)
            if torch.is_grad_enabled() and q.requires_grad:
                attended = _NoGradient.apply(attended, q)
        return self.o_proj(attended.flatten(-2)), None

    def lola_weights(self, rotation: KeyRotation | None) -> LolaWeights:
        """The layer's weights as ops take them, without gradients; `rotation` as in `forward`."""
        return LolaWeights.prepare(
            self.feature_map_q.detach(),
            self.feature_map_k.detach(),
            self.window_factors.detach(),
            self.lola.mixing,
            self.v_proj.out_features // self.head_dim,
            None if self.importance is None else self.importance.detach(),
            rotation,
        )

    def qkv(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, Q, Hq, d]`, k and v `[B, Q, Hkv, d]`; q and k after their norms and RoPE."""
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        return q, k, v

    def _attend_whole(self, q: Tensor, k: Tensor, v: Tensor, tokens: NewTokens) -> Tensor:
        """Attention over whole sequences, with gradients. Padding is moved behind the tokens."""
        if self.training and self.attention_dropout:
            raise LolaModelError(
                f"attention_dropout = {self.attention_dropout}: LoLA has none; set it to 0"
            )
        weights = (self.feature_map_q, self.feature_map_k, self.window_factors)
        order = tokens.tokens_first(q.device)
        if order is not None:
            q, k, v = (_columns(x, order) for x in (q, k, v))
        out = lola_attention_parallel(q, k, v, *weights, self.lola, importance=self.importance)
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


class LolaLlamaPreTrainedModel(LlamaPreTrainedModel):
    """Attributes that transformers needs of both classes below."""

    config: LolaLlamaConfig
    # There is one implementation of attention, so attn_implementation has no choice.
    _supports_flash_attn = False
    _supports_sdpa = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _is_stateful = True  # tokens cannot be removed from a state, so no assisted decoding
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer}  # noqa: RUF012 (transformers' form)
    # The server has them in float32; bfloat16 would change gates and choices.
    _keep_in_fp32_modules_strict = ["window_factors", "importance"]  # noqa: RUF012

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do; see `LolaLlamaConfig.register_for_auto_class`."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """LoLCATs' starting point, identity maps and g = 0.1, where a checkpoint has none."""
        super()._init_weights(module)
        if isinstance(module, LolaLlamaAttention):
            for weight in (module.feature_map_q, module.feature_map_k):
                init.copy_(weight, torch.eye(*weight.shape[1:]).expand_as(weight))
            init.constant_(module.window_factors, WINDOW_FACTOR_INIT)
            if module.importance is not None:
                init.zeros_(module.importance)  # all pairs weigh the same


class LolaLlamaModel(LolaLlamaPreTrainedModel, LlamaModel):
    """Llama's decoder with LoLA attention in every layer."""

    def __init__(self, config: LolaLlamaConfig) -> None:
        if config.name_or_path:
            settle_facts(config, config.name_or_path)
        super().__init__(config)
        self.schedule = ShiftSchedule.of(config)
        for i, layer in enumerate(self.layers):
            layer.self_attn = LolaLlamaAttention(config, i)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LolaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run `LlamaModel.forward` with four differences.

        Padding (zeros in `attention_mask [B, seen + Q]`, on any side) is left out of the state, and
        positions count tokens only unless `position_ids` says otherwise. The cache is a
        `LolaCache`. `use_cache` defaults to the config's under `torch.no_grad()`, and to False
        where gradients are recorded, as none flow through a cache. With a `context_shift`, rows
        may be of any length.

        Raises:
            LolaModelError: another kind of cache or one of another batch size, a mask that is no
                padding mask, packed rows; without a cache, rows beyond the trained length.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        if past_key_values is not None and not isinstance(past_key_values, LolaCache):
            raise LolaModelError(
                f"past_key_values is a {type(past_key_values).__name__}: a LoLA state is no list "
                "of keys and values; use a lola_vllm.engine.hf.LolaCache, or leave it out"
            )
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None:
            raise LolaModelError("neither input_ids nor inputs_embeds: give one of them")
        if use_cache and past_key_values is None:
            past_key_values = LolaCache(self.config)
        batch, columns = inputs.shape[:2]
        tokens = NewTokens.of(attention_mask, batch, columns)
        seen = torch.zeros(batch, dtype=torch.int64)
        if past_key_values is not None:
            seen = past_key_values.num_tokens(batch)
        if position_ids is None:
            position_ids = tokens.positions(seen, inputs.device)
        else:
            tokens.check_positions(position_ids)
        rotation = None
        if self.schedule is not None:
            longest = int(tokens.lengths.max()) if len(tokens.lengths) else 0
            if past_key_values is None and longest > self.schedule.length:
                raise LolaModelError(
                    f"a row of {longest} tokens without a cache: beyond max_position_embeddings = "
                    f"{self.schedule.length} a row needs one; use_cache=True, which passes on no "
                    "gradients"
                )
            position_ids = self.schedule.rope_position(position_ids)
            rotation = self._key_rotation(self.schedule, inputs.device)
        return super().forward(
            input_ids=input_ids,
            # Llama passes a mask with four dimensions on as it is. From others it would make one of
            # Q x (seen + Q), which is not used here.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs.device),
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            new_tokens=tokens,
            rotation=rotation,
            **kwargs,
        )

    def _key_rotation(self, schedule: ShiftSchedule, device: torch.device) -> KeyRotation:
        """How a context shift rotates keys, from RoPE itself."""
        wide = torch.promote_types(self.dtype, torch.float32)
        cos, sin = self._rope_rows(torch.tensor([0, schedule.interval], device=device), wide)
        return KeyRotation.of_table(schedule, cos, sin)

    def _rope_rows(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin `[n, R / 2]` of RoPE at positions `[n]`."""
        like = torch.empty(1, dtype=dtype, device=positions.device)
        both = self.rotary_emb(like, positions[None])
        cos, sin = (x[0, :, : x.shape[-1] // 2] for x in both)  # the halves are equal
        return cos, sin

    def rope_table(self) -> RopeTable:
        """RoPE at every position of the trained length, in host memory.

        Raises:
            LolaModelError: it depends on the length of a context.
        """
        if self.rotary_emb.rope_type in ("dynamic", "longrope"):
            raise LolaModelError(
                f"rope_type = {self.rotary_emb.rope_type!r}: it has several tables, by the length "
                "of a context, and keys cannot be rotated from one to another"
            )
        wide = torch.promote_types(self.dtype, torch.float32)
        positions = torch.arange(self.config.max_position_embeddings, device=self.device)
        cos, sin = self._rope_rows(positions, wide)
        return RopeTable.of_rows(cos.cpu(), sin.cpu())

    def composer(self, sequence: SequenceLayout) -> Composer:
        """What composes states of this model, in host memory, with its weights as they are.

        Args:
            sequence: the layout of a state.

        Raises:
            LolaModelError: RoPE's table depends on the length of a context.
        """
        rope = self.rope_table()
        rotation = None if self.schedule is None else self._key_rotation(self.schedule, self.device)
        modules = (layer.self_attn for layer in self.layers)
        weights = [m.lola_weights(rotation) for m in modules if isinstance(m, LolaLlamaAttention)]
        return Composer(sequence, weights, rope)


class LolaLlamaForCausalLM(LolaLlamaPreTrainedModel, LlamaForCausalLM):
    """A LoLA model with its output matrix; the class that checkpoints name."""

    def __init__(self, config: LolaLlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # not Llama's: it would build a whole Llama
        self.model = LolaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(  # type: ignore[override]  # options pass through
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Write a LoLA checkpoint as `lola-vllm` does: vLLM serves it as it is."""
        self.config.auto_map = dict(AUTO_MAP)
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_remote_code(directory)  # first: the next call may upload what is there
        super().save_pretrained(save_directory, **kwargs)

    def _prepare_cache_for_generation(  # type: ignore[override]  # as between its versions
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """transformers' hook of `generate`, which would make a `DynamicCache`."""
        if (wanted := generation_config.cache_implementation) is not None:
            raise LolaModelError(
                f"cache_implementation = {wanted!r}: a LoLA model has one cache; leave it out"
            )
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LolaCache(self.config)
