"""vLLM's side of the state page: the spec of one page, and the custom block manager.

One block of vLLM's pool is one state slot: a sequence takes one when it is admitted (two while
prefix caching keeps the state at the last block boundary), keeps it for life, and gives it back at
the end. Nobody clears a slot: what is valid in it follows from the token count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.logger import init_logger
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import MambaSpec

from lola_vllm.config import LolaLlamaConfig
from lola_vllm.plugin import compat
from lola_vllm.state import StateLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool

logger = init_logger("vllm.lola")

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class LolaStateSpec(MambaSpec):
    """One page: one sequence, one layer, on one rank.

    Attributes:
        layout: shapes, dtypes and offsets of the page.
        num_layers: layers of this rank, each with a page per sequence.
    """

    layout: StateLayout
    num_layers: int

    @property
    def states_per_sequence(self) -> int:
        """Slots that a running sequence holds: 2 while prefix caching is on, else 1."""
        return 2 if self.mamba_cache_mode == "align" else 1

    @property
    def bytes_per_sequence(self) -> int:
        """All layers' pages of a running sequence on this rank."""
        return self.states_per_sequence * self.num_layers * self.page_size_bytes


class LolaStateManager(MambaManager):
    """The block manager of LoLA's state slots; allocation itself is vLLM's for Mamba states."""

    def __init__(self, kv_cache_spec: LolaStateSpec, block_pool: BlockPool, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self.spec = kv_cache_spec
        logger.info(describe_pool(kv_cache_spec, self.num_slots))

    @property
    def num_slots(self) -> int:
        """State slots of the pool (vLLM keeps block 0 as its null block)."""
        return self.block_pool.num_gpu_blocks - 1

    @property
    def num_slots_in_use(self) -> int:
        """Slots held by running sequences; states kept for prefix hits do not count."""
        return self.num_slots - self.block_pool.get_num_free_blocks()


def describe_pool(spec: LolaStateSpec, num_slots: int) -> str:
    """The start-up line: MiB per sequence, sequences that fit, break-even against a full cache."""
    break_even = spec.layout.break_even_tokens(spec.states_per_sequence)
    states = f"{spec.states_per_sequence} states of " if spec.states_per_sequence > 1 else ""
    return (
        f"LoLA: {spec.bytes_per_sequence / MIB:.2f} MiB per sequence whatever its length "
        f"({states}{spec.num_layers} layers x {spec.page_size_bytes / 1024:.1f} KiB, this rank), "
        f"{num_slots // spec.states_per_sequence} sequences fit; a full KV cache would be larger "
        f"beyond {break_even:,} tokens of context (vLLM's line 'KV cache size' counts "
        "--max-model-len tokens for each of these sequences, which is no limit of theirs)"
    )


def state_layout(vllm_config: VllmConfig) -> StateLayout:
    """Layout of this model's pages on one tensor-parallel rank."""
    config = lola_hf_config(vllm_config)
    kv_heads = num_kv_heads(config)
    kv_dtype = vllm_config.model_config.dtype
    assert isinstance(kv_dtype, torch.dtype)  # vLLM has resolved "auto" and other names
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    lola = config.lola
    num_state_heads = lola.num_state_heads or config.num_attention_heads
    lola.check_heads(config.num_attention_heads, kv_heads, num_state_heads)
    return StateLayout.from_config(
        lola,
        num_kv_heads=max(1, kv_heads // tp_size),
        num_state_heads=max(1, num_state_heads // tp_size),
        head_dim=head_dim(config),
        kv_dtype=kv_dtype,
    )


def lola_hf_config(vllm_config: VllmConfig) -> LolaLlamaConfig:
    """The model's Hugging Face config, which is ours by its `model_type`."""
    return cast(LolaLlamaConfig, vllm_config.model_config.hf_config)


def num_kv_heads(config: LolaLlamaConfig) -> int:
    """KV heads of the whole model."""
    heads = config.num_key_value_heads
    assert heads is not None  # LlamaConfig fills it in
    return heads


def head_dim(config: LolaLlamaConfig) -> int:
    """Size of a head, stated or derived as Llama does."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def state_spec(vllm_config: VllmConfig, layout: StateLayout, **mamba_fields: Any) -> LolaStateSpec:
    """The spec of a layer's page; `mamba_fields` are those vLLM gives every Mamba layer."""
    num_layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    return LolaStateSpec(
        shapes=((layout.page_bytes,),),
        dtypes=(torch.uint8,),
        layout=layout,
        num_layers=num_layers,
        **mamba_fields,
    )


compat.register_kv_cache_spec(LolaStateSpec, LolaStateManager)
