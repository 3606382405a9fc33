"""LoLA models for transformers: any decoder that transformers has, with LoLA attention."""

# No `from __future__ import annotations`: transformers reads the class of `config` from its
# annotation.

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from lola_vllm.core.config import CLASS_HOOKS, DecoderConfig
from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.lola_config import importance_size
from lola_vllm.core.ops.compose import Composer
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.rope_table import RopeTable
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.engine.hf.attention import (
    ATTENTION,
    Forward,
    attentions,
    lola_weights,
    order_heads,
)
from lola_vllm.engine.hf.cache import LolaCache
from lola_vllm.engine.hf.candidates import Candidates
from lola_vllm.engine.hf.tokens import LolaModelError, NewTokens
from lola_vllm.models import rope
from lola_vllm.models.remote_code import AUTO_MAP, write_remote_code
from lola_vllm.models.schema import WINDOW_FACTOR_INIT, settle_facts

# A model's own classes come behind this one; see `model_class`.
_Base: Any = PreTrainedModel if TYPE_CHECKING else object


class LolaForCausalLM(_Base):
    """A LoLA model with its output matrix: the class of its base, with this one before it.

    `LolaForCausalLM(config)` and `LolaForCausalLM.from_pretrained(directory)` are of the subclass
    that suits the base (`model_class`). Each layer's attention has the parameters `feature_map_q
    [Hq, d, F]`, `feature_map_k [Hs, d, F]` and `window_factors [Hq]` (before the sigmoid) beside
    the base's own, and `importance [Hkv, d // 2 + d + 1]` (float32, no gradient) where the
    checkpoint has it, else None. Sliding layers have none of them.

    A forward differs from the base's in four things. Padding (zeros in `attention_mask
    [B, seen + Q]`, on any side) is left out of the state, and positions count tokens only unless
    `position_ids` says otherwise. The cache is a `LolaCache`. `use_cache` defaults to the config's
    under `torch.no_grad()`, and to False where gradients are recorded, as none flow through a
    cache. With a `context_shift`, rows may be of any length.

    Raises:
        LolaModelError: in a forward: another kind of cache or one of another batch size, a mask
            that is no padding mask, packed rows; without a cache, rows beyond the trained length.
    """

    config: DecoderConfig
    model: Any

    # There is one implementation of attention, so attn_implementation has no choice.
    _can_compile_fullgraph = False

    def __new__(cls, config: DecoderConfig, *args: Any, **kwargs: Any) -> Any:
        """An instance of the subclass that suits the base."""
        made = model_class(cast(Any, type(config))) if cls is LolaForCausalLM else cls
        return super().__new__(made)

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:
        if config.name_or_path:
            settle_facts(config, config.name_or_path)
        config.check_sizes()
        if config._attn_implementation not in (None, ATTENTION):
            raise LolaModelError(
                f"attn_implementation = {config._attn_implementation!r}: a LoLA model has one "
                "attention; leave it out"
            )
        config._attn_implementation = ATTENTION
        super().__init__(config, *args, **kwargs)
        self.schedule = ShiftSchedule.of(config)
        self._rotations: dict[Any, tuple[KeyRotation, ...]] = {}
        self._forward: list[Forward | None] = [None]  # the one that runs
        order_heads(self)
        heads, d, facts = config.num_attention_heads, config.head_dim, config.facts
        for attention in attentions(self):
            attention.lola_forward = self._forward
            if attention.lola_window is not None:
                continue
            attention._is_hf_initialized = False  # new parameters; transformers looks at modules
            attention.feature_map_q = nn.Parameter(torch.empty(heads, d, facts.feature_dim))
            maps_k = torch.empty(facts.num_state_heads, d, facts.feature_dim)
            attention.feature_map_k = nn.Parameter(maps_k)
            attention.window_factors = nn.Parameter(torch.empty(heads))
            attention.importance = None
            if facts.importance:
                shape = (config.num_key_value_heads, importance_size(d))
                attention.importance = nn.Parameter(torch.empty(shape))
        self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.model.register_forward_hook(self._after_forward)
        self.model._init_weights = self._init_weights  # which a decoder asks of itself
        self.post_init()

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained` of the subclass that suits the base."""
        if cls is not LolaForCausalLM:
            return super().from_pretrained(directory, *args, **kwargs)
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(directory)
        made = model_class(cast(Any, type(config)))
        return made.from_pretrained(directory, *args, config=config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do; see `DecoderConfig.register_for_auto_class`."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """LoLCATs' starting point, identity maps and g = 0.1, where a checkpoint has none."""
        super()._init_weights(module)
        if "feature_map_q" in module._parameters:
            for weight in (module.feature_map_q, module.feature_map_k):
                assert isinstance(weight, Tensor)
                init.copy_(weight, torch.eye(*weight.shape[1:]).expand_as(weight))
            factors, importance = module.window_factors, module.importance
            assert isinstance(factors, Tensor)
            init.constant_(factors, WINDOW_FACTOR_INIT)
            if isinstance(importance, Tensor):
                init.zeros_(importance)  # all pairs weigh the same

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The decoder's arguments in its own terms, and what LoLA's attention needs beside them."""
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        if cache is not None and not isinstance(cache, LolaCache):
            raise LolaModelError(
                f"past_key_values is a {type(cache).__name__}: a LoLA state is no list of keys and "
                "values; use a lola_vllm.engine.hf.LolaCache, or leave it out"
            )
        inputs = kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            raise LolaModelError("neither input_ids nor inputs_embeds: give one of them")
        if use_cache and cache is None:
            cache = LolaCache(self.config)
        batch, columns = inputs.shape[:2]
        tokens = NewTokens.of(kwargs.pop("attention_mask", None), batch, columns)
        seen = torch.zeros(batch, dtype=torch.int64)
        if cache is not None:
            seen = cache.num_tokens(batch)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = tokens.positions(seen, inputs.device)
        else:
            tokens.check_positions(positions)
        rotations = None
        if self.schedule is not None:
            longest = int(tokens.lengths.max()) if len(tokens.lengths) else 0
            if cache is None and longest > self.schedule.length:
                raise LolaModelError(
                    f"a row of {longest} tokens without a cache: beyond max_position_embeddings = "
                    f"{self.schedule.length} a row needs one; use_cache=True, which passes on no "
                    "gradients"
                )
            positions = self.schedule.rope_position(positions)
            rotations = self.key_rotations(inputs.device)
        self._forward[0] = Forward(tokens, cache, rotations)
        if cache is not None:
            cache.is_read = True
        return (), {
            **kwargs,
            "attention_mask": None,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": use_cache,
            "lola": self._forward[0],
        }

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        """Let go of the cache. A backward pass with checkpoints runs layers once more."""
        forward = self._forward[0]
        if forward is not None and forward.cache is not None:
            forward.cache.is_read = False
            self._forward[0] = None

    @torch.compiler.disable
    def key_rotations(self, device: torch.device) -> tuple[KeyRotation, ...]:
        """How a context shift rotates the keys of each layer, from RoPE itself."""
        schedule = self.schedule
        assert schedule is not None
        wide = torch.promote_types(self.dtype, torch.float32)
        if (device, wide) not in self._rotations:
            made = {}
            for order, (cos, sin) in self._tables((0, schedule.interval), wide).items():
                made[order] = KeyRotation.of_table(schedule, cos.to(device), sin.to(device))
            found = tuple(made[attention.lola_order] for attention in attentions(self))
            self._rotations[device, wide] = found
        return self._rotations[device, wide]

    def _tables(self, positions: Any, dtype: torch.dtype) -> dict[Any, tuple[Tensor, Tensor]]:
        """cos and sin `[n, d / 2]` of RoPE at positions, by the layers' orders of heads."""
        rotary, d = self.model.rotary_emb, self.config.head_dim
        layers = {attention.lola_order: attention for attention in attentions(self)}
        return {
            order: rope.table(attention, rotary, order, d, positions, dtype)
            for order, attention in layers.items()
        }

    def rope_table(self) -> RopeTable:
        """RoPE at every position of the trained length, in host memory.

        Raises:
            LolaConfigError: it depends on the length of a context, or on the layer.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        tables = self._tables(range(self.config.max_position_embeddings), wide)
        rope.check_one(len(tables))
        return RopeTable.of_rows(*next(iter(tables.values())))

    def composer(self, sequence: SequenceLayout) -> Composer:
        """What composes states of this model, in host memory, with its weights as they are.

        Args:
            sequence: the layout of a state.

        Raises:
            LolaConfigError: as `rope_table`.
        """
        table, lola = self.rope_table(), self.config.lola
        shifts = self.schedule is not None
        rotations = self.key_rotations(self.device) if shifts else None
        weights = [
            lola_weights(attention, lola, None if rotations is None else rotations[i])
            for i, attention in enumerate(attentions(self))
        ]
        return Composer(sequence, weights, table)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write a LoLA checkpoint as `lola-vllm` does: vLLM serves it as it is."""
        self.config.auto_map = dict(AUTO_MAP)
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_remote_code(directory)  # first: the next call may upload what is there
        super().save_pretrained(save_directory, **kwargs)

    def _prepare_cache_for_generation(
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

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' hook of assisted decoding: candidates that the state takes back."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        if isinstance(getattr(generator, "assistant_model", None), LolaForCausalLM):
            raise LolaModelError(
                "assistant_model: a LoLA model's own candidates cannot be taken back across an "
                "update; use a stock model, or prompt_lookup_num_tokens"
            )
        mask = kwargs["model_kwargs"].get("attention_mask")
        padding = 0 if mask is None else int((mask == 0).sum())
        layers = map(self.config.for_layer, range(self.config.num_hidden_layers))
        interval = min(lola.update_interval for lola, _ in layers)  # 1 of sliding layers: none
        return Candidates(generator, interval, self.schedule, padding)


@functools.cache
def model_class(config: Any) -> type[Any]:
    """The class of LoLA models of a base, for the class of their configs (`config_class`)."""
    base: Any = AutoModelForCausalLM._model_mapping[config.base_class]
    kept = [*(base._keep_in_fp32_modules_strict or ()), "window_factors", "importance"]
    members = {
        "__module__": __name__,
        "config_class": config,
        # The server has them in float32; bfloat16 would change gates and choices.
        "_keep_in_fp32_modules_strict": kept,
    }
    made = type(f"Lola{base.__name__}", (LolaForCausalLM, base), members)
    # Experts have other names in files than in memory; transformers knows them by class or type.
    names = (base.__name__, config.base_class.model_type)
    renamed = next(filter(None, map(get_checkpoint_conversion_mapping, names)), None)
    if renamed:
        register_checkpoint_conversion_mapping(made.__name__, renamed, overwrite=True)
    return made


def register(config: type[DecoderConfig]) -> None:
    """Let `AutoModelForCausalLM` load the LoLA models of a base."""
    if config.base_class in AutoModelForCausalLM._model_mapping:
        made = model_class(cast(Any, config))
        AutoModelForCausalLM.register(config, made, exist_ok=True)


CLASS_HOOKS.append(register)
for known in DecoderConfig.__subclasses__():
    register(known)
