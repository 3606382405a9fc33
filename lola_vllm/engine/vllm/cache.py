"""vLLM's side of the state: the spec of one sequence's state, and the custom block manager.

One block of vLLM's pool holds one state: a sequence takes one when it is admitted (two while
prefix caching keeps the state at the last block boundary), keeps it for life, and gives it back at
the end. Nobody clears a block: what is valid in it follows from the token count.

A state is one row of bytes with the pages of all layers. To vLLM it is the page of the first layer
alone; the others have no spec, as layers that share another's cache. So layers may have pages of
different sizes, and vLLM copies a state at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import MambaSpec

from lola_vllm.core import layers
from lola_vllm.core.config import DecoderConfig
from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.state import LayerLayout
from lola_vllm.engine.vllm import compat

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool

logger = init_logger("vllm.lola")

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class LolaStateSpec(MambaSpec):
    """One state: one sequence, all layers of one rank.

    Attributes:
        sequence: the rank's pages. Ranks of a pipeline may differ in it, and are of one size.
    """

    sequence: SequenceLayout = field(compare=False)

    @property
    def states_per_sequence(self) -> int:
        """States that a running sequence holds: 2 while prefix caching is on, else 1."""
        return 2 if self.mamba_cache_mode == "align" else 1

    @property
    def bytes_per_sequence(self) -> int:
        """What a running sequence takes on this rank."""
        return self.states_per_sequence * self.page_size_bytes


class LolaStateManager(MambaManager):
    """The block manager of LoLA's states; allocation itself is vLLM's for Mamba states."""

    def __init__(self, kv_cache_spec: LolaStateSpec, block_pool: BlockPool, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self.spec = kv_cache_spec
        logger.info(describe_pool(kv_cache_spec, self.num_states))

    @property
    def num_states(self) -> int:
        """States that fit in the pool (vLLM keeps block 0 as its null block)."""
        return self.block_pool.num_gpu_blocks - 1

    @property
    def num_states_in_use(self) -> int:
        """States held by running sequences; states kept for prefix hits do not count."""
        return self.num_states - self.block_pool.get_num_free_blocks()


def describe_pool(spec: LolaStateSpec, num_states: int) -> str:
    """The start-up line: MiB per sequence, sequences that fit, break-even against a full cache."""
    break_even = spec.sequence.break_even_tokens(spec.states_per_sequence)
    states = f"{spec.states_per_sequence} states of " if spec.states_per_sequence > 1 else ""
    sizes = sorted({layer.page_bytes / 1024 for layer in spec.sequence.layers})
    each = " to ".join(f"{size:.1f}" for size in dict.fromkeys((sizes[0], sizes[-1])))
    return (
        f"LoLA: {spec.bytes_per_sequence / MIB:.2f} MiB per sequence whatever its length "
        f"({states}{len(spec.sequence.layers)} layers x {each} KiB, this rank), "
        f"{num_states // spec.states_per_sequence} sequences fit; a full KV cache would be larger "
        f"beyond {break_even:,} tokens of context (vLLM's line 'KV cache size' counts "
        "--max-model-len tokens for each of these sequences, which is no limit of theirs)"
    )


def sequence_layout(vllm_config: VllmConfig, tp_rank: int = 0) -> SequenceLayout:
    """The pages of a rank's layers.

    Args:
        tp_rank: of the tensor-parallel ranks, which differ only where the KV heads of a layer have
            caches of different sizes.
    """
    start = first_layer(vllm_config)
    end = start + vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    return SequenceLayout(layer_layouts(vllm_config, tp_rank)[start:end])


def first_layer(vllm_config: VllmConfig) -> int:
    """Index in the model of this rank's first layer."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return int(model.get_layers_start_end_indices(parallel)[0])


def row_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of a state: the largest state of all ranks."""
    parallel = vllm_config.parallel_config
    size, largest = parallel.pipeline_parallel_size, 0
    for tp_rank in range(parallel.tensor_parallel_size):
        layers = layer_layouts(vllm_config, tp_rank)
        for rank in range(size):
            part = layers[slice(*get_pp_indices(len(layers), rank, size))]
            largest = max(largest, SequenceLayout(part).row_bytes)
    return largest


def layer_layouts(vllm_config: VllmConfig, tp_rank: int = 0) -> tuple[LayerLayout, ...]:
    """The pages of every layer of the model on one tensor-parallel rank."""
    config, kv_dtype = lola_hf_config(vllm_config), vllm_config.model_config.dtype
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    assert isinstance(kv_dtype, torch.dtype)  # vLLM has resolved "auto" and other names
    config.lola.check_heads(heads, kv_heads, config.facts.num_state_heads)
    config.check_sizes()
    ranks = vllm_config.parallel_config.tensor_parallel_size
    return layers.layer_layouts(config, kv_dtype, ranks, tp_rank)


def lola_hf_config(vllm_config: VllmConfig) -> DecoderConfig:
    """The model's Hugging Face config, which is ours by its `model_type`."""
    return cast(DecoderConfig, vllm_config.model_config.hf_config)


def state_spec(vllm_config: VllmConfig, **mamba_fields: Any) -> LolaStateSpec:
    """The spec of a state; `mamba_fields` are those vLLM gives every Mamba layer."""
    return LolaStateSpec(
        shapes=((row_bytes(vllm_config),),),
        dtypes=(torch.uint8,),
        sequence=sequence_layout(vllm_config),
        **mamba_fields,
    )


compat.register_kv_cache_spec(LolaStateSpec, LolaStateManager)
