"""The attention layer of a LoLA model in vLLM: owns weights and page views, and calls the ops.

One decode step, top to bottom: projections and RoPE, which are the decoder's own (compiled with the
rest of the model) -> `torch.ops.lola.attention`, where vLLM splits its graph -> the back end's
decode and prefill ops, which work in place on the pages -> output projection.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from lola_vllm.core.lola_config import importance_size
from lola_vllm.core.ops import Backend, LayerState, LolaWeights, choose_backend, context_shift
from lola_vllm.core.ops.compose import Composer
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.rope_table import RopeTable
from lola_vllm.core.ops.self_check import serving_backend
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.ops.sliding import ops_of
from lola_vllm.engine.vllm.backend import LolaMetadata, check_capture
from lola_vllm.engine.vllm.cache import (
    first_layer,
    lola_hf_config,
    sequence_layout,
    state_spec,
)
from lola_vllm.engine.vllm.compat import BACKEND_NAME
from lola_vllm.models import rope

OP = "lola::attention"


class LolaAttention(nn.Module, MambaBase):
    """LoLA attention behind a decoder's projections, norms and RoPE.

    Parameters (this rank's heads): `feature_map_q [Hq, d, F]`, `feature_map_k [Hs, d, F]` and
    `window_factors [Hq]` (float32, before the sigmoid); `importance [Hkv, d // 2 + d + 1]`
    (float32) where the checkpoint has it, else None. Sliding layers have none of them.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__()
        vllm_config = get_current_vllm_config()
        config = lola_hf_config(vllm_config)
        self.prefix = prefix
        self.lola = config.lola
        self.schedule = ShiftSchedule.of(config)
        self.trained_length = int(config.max_position_embeddings)
        self.sequence = sequence_layout(vllm_config, get_tensor_model_parallel_rank())
        self.index = extract_layer_index(prefix) - first_layer(vllm_config)  # on the rank
        self.layout = self.sequence.layers[self.index]
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_heads = heads // get_tensor_model_parallel_world_size()
        self.num_kv_heads = self.layout.num_kv_heads
        self.head_dim = config.head_dim
        facts = config.facts
        self.importance: nn.Parameter | None = None
        if not self.layout.slides:
            map_shape = (self.head_dim, facts.feature_dim)
            self.feature_map_q = _head_parameter(self.num_heads, map_shape, heads)
            self.feature_map_k = _head_parameter(
                self.layout.num_state_heads, map_shape, facts.num_state_heads
            )
            self.window_factors = _head_parameter(self.num_heads, (), heads, torch.float32)
            if facts.importance:
                shape = (importance_size(self.head_dim),)
                self.importance = _head_parameter(self.num_kv_heads, shape, kv_heads, torch.float32)

        self.sink_logits: Tensor | None = None  # of the base's learned sinks, `[Hq]`
        self.has_rope = True
        self.kv_cache = (torch.tensor([]),)
        self.state: LayerState | None = None
        self.ops: Backend  # with the state
        self.sharing: list[LolaAttention] = []  # of the rank's first layer: all of its layers
        # Sees a step's k and v `[T, Hkv, d]`, after RoPE; only while a prompt's memory is read.
        self.kv_hook: Callable[[Tensor, Tensor], None] | None = None
        # Sees its q `[T, Hq, d]`, after RoPE; only while a library is asked.
        self.query_hook: Callable[[Tensor], None] | None = None
        self._join(vllm_config)

    def _join(self, vllm_config: VllmConfig) -> None:
        """Let vLLM find this layer: state pages for it, and a graph split at its op."""
        compilation = vllm_config.compilation_config
        if self.prefix in compilation.static_forward_context:
            raise ValueError(f"Duplicate layer name: {self.prefix}")
        layers = compilation.static_forward_context.values()
        first = next((layer for layer in layers if isinstance(layer, LolaAttention)), self)
        compilation.static_forward_context[self.prefix] = self
        # The rank's first layer has the blocks in vLLM's eyes, and binds the others.
        self.pool_layer = first.prefix
        first.sharing.append(self)
        if compilation.splitting_ops is not None and OP not in compilation.splitting_ops:
            compilation.splitting_ops.append(OP)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[T, Hq * d]`, k and v `[T, Hkv * d]`, q and k after RoPE -> `[T, Hq * d]`."""
        attended = torch.empty_like(q)
        torch.ops.lola.attention(q, k, v, attended, self.prefix)
        return attended

    @abstractmethod
    def rope_rows(self, positions: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin `[n, R / 2]` of RoPE at positions, as `KeyRotation.of_table` has them.

        Raises:
            LolaConfigError: RoPE has several tables, by the length of a context.
        """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, metadata: LolaMetadata) -> None:
        """Run a step's decodes and prefills: q, out `[T, Hq * d]`, k, v `[T, Hkv * d]`."""
        assert self.state is not None
        # Thirty layers of views and slices are a percent of a small model's step: none for nothing.
        q, out = (x.view(-1, self.num_heads, self.head_dim) for x in (q, out))
        k, v = (x.view(-1, self.num_kv_heads, self.head_dim) for x in (k, v))
        if self.kv_hook is not None:
            self.kv_hook(k, v)
        if self.query_hook is not None:
            self.query_hook(q)
        if metadata.query_start_loc_d_cpu is not None:
            for tokens, batch in metadata.decode_rounds:
                answers = out[tokens]
                self.ops.decode(self.state, q[tokens], k[tokens], v[tokens], batch, answers)
                if not isinstance(tokens, slice):
                    out[tokens] = answers
        elif metadata.num_decodes:
            batch = metadata.decode_batch
            rows = (q, k, v, out)
            if len(batch.state_indices) < len(q):  # prefills follow
                stop = len(batch.state_indices)
                rows = (q[:stop], k[:stop], v[:stop], out[:stop])
            self.ops.decode(self.state, rows[0], rows[1], rows[2], batch, rows[3])
        if metadata.num_prefills:
            start = metadata.num_decode_tokens
            stop = start + metadata.num_prefill_tokens
            rows = (q[start:stop], k[start:stop], v[start:stop], out[start:stop])
            segments = metadata.prefill_segments
            after = functools.partial(self._copy, metadata) if metadata.waypoints else None
            context_shift.prefill(
                self.ops.prefill, self.state, *rows[:3], segments, rows[3], after, self.ops.shift
            )

    def _copy(self, metadata: LolaMetadata, segment: int) -> None:
        """Copy the layer's pages at the waypoints that a segment ends at."""
        assert self.state is not None
        for waypoint in metadata.waypoints_after.get(segment, ()):
            waypoint.copy(self.index, self.state.pages)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the rank's blocks, give each layer its pages, and compile and check what they need.

        Args:
            kv_cache: `[num_blocks, 1, 1, row_bytes]` int8.

        vLLM calls this of the rank's first layer alone, as no other has a spec.
        """
        rows = kv_cache.squeeze(dim=(1, 2))
        self.kv_cache = (rows,)
        states = []
        for layer, pages in zip(self.sharing, self.sequence.pages(rows), strict=True):
            layer.state = layer._bind(pages)
            states.append(layer.state)
        ops = serving_backend(
            choose_backend(rows.device.type, self.layout.pages[0].kv_dtype),
            [state for state in states if not state.layout.slides],
        )
        check_capture(ops, rows.device.type)  # another one may have to serve
        for layer in self.sharing:
            layer.ops = ops_of(layer.layout, ops, rows.device.type)

    def weights_changed(self) -> None:
        """Take new parameters into use; before the pages are there, nothing is to be done."""
        if self.state is not None:
            self.state = self._bind(self.state.pages)

    def _bind(self, pages: Tensor) -> LayerState:
        rotation = None
        if self.schedule is not None:
            wide = torch.promote_types(self.layout.pages[0].kv_dtype, torch.float32)
            cos, sin = self.rope_rows((0, self.schedule.interval), wide)
            rotation = KeyRotation.of_table(
                self.schedule, cos.to(pages.device), sin.to(pages.device)
            )
        sinks = None if self.sink_logits is None else self.sink_logits.data
        if self.layout.slides:
            sizes = self.num_heads, self.num_kv_heads, self.head_dim
            like = torch.empty(0, dtype=self.layout.pages[0].kv_dtype, device=pages.device)
            weights = LolaWeights.of_window(*sizes, self.lola.mixing, like, rotation, sinks)
        else:
            weights = LolaWeights.prepare(
                self.feature_map_q.data,
                self.feature_map_k.data,
                self.window_factors.data,
                self.lola.mixing,
                self.num_kv_heads,
                None if self.importance is None else self.importance.data,
                rotation,
                sinks,
            )
        return LayerState.bind(weights, self.layout, pages)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The backend's registered name."""
        return MambaAttentionBackendEnum[BACKEND_NAME]

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """One packed row, so that vLLM copies a state as one blob."""
        return ((self.sequence.row_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Bytes; `StateLayout.views` gives the typed parts."""
        return (torch.uint8,)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """A block as vLLM's pool sees it; None for all but the rank's first layer."""
        if self.pool_layer != self.prefix:
            return None
        base = super().get_kv_cache_spec(vllm_config)
        assert isinstance(base, MambaSpec)
        return state_spec(
            vllm_config,
            block_size=base.block_size,
            page_size_padded=base.page_size_padded,
            mamba_type=base.mamba_type,
            mamba_cache_mode=base.mamba_cache_mode,
            num_speculative_blocks=0,  # rejected drafts are a smaller count of the same state
        )


def composer_of(layers: Sequence[LolaAttention]) -> Composer:
    """What composes states of a rank's layers, in host memory.

    Raises:
        LolaConfigError: RoPE's table depends on the length of a context, or on the layer.
    """
    weights = [layer.state.weights for layer in layers if layer.state is not None]
    return Composer(layers[0].sequence, weights, rope_of(layers[0]))


def rope_of(layer: LolaAttention) -> RopeTable:
    """RoPE's angles in the trained length, in host memory and in the dtype of sums.

    Raises:
        LolaConfigError: as `composer_of`.
    """
    wide = torch.promote_types(layer.layout.pages[0].kv_dtype, torch.float32)
    rows = layer.rope_rows(range(layer.trained_length), wide)
    rope.check_one(len({x.has_rope for x in layer.sharing or [layer]}))
    return RopeTable.of_rows(*(x.cpu() for x in rows))


def _head_parameter(
    num_heads: int, shape: tuple[int, ...], total_heads: int, dtype: torch.dtype | None = None
) -> nn.Parameter:
    """A parameter `[num_heads, *shape]` that loads this rank's heads of `total_heads`."""
    parameter = nn.Parameter(torch.empty(num_heads, *shape, dtype=dtype), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": _head_loader(total_heads)})
    return parameter


def _head_loader(total_heads: int) -> Callable[[Tensor, Tensor], None]:
    def load(parameter: Tensor, loaded: Tensor) -> None:
        # With fewer heads than ranks, neighbours share a head, as vLLM does for KV heads.
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        parameter.data.copy_(loaded.narrow(0, rank * total_heads // ranks, len(parameter)))

    return load


def _attention(q: Tensor, k: Tensor, v: Tensor, output: Tensor, layer_name: str) -> None:
    context = get_forward_context()
    if context.attn_metadata is None:  # profiling and warm-up runs have no sequences
        output.zero_()
        return
    assert isinstance(context.attn_metadata, dict)  # a list is for batches cut in two
    layer = context.no_compile_layers[layer_name]
    layer.attend(q, k, v, output, context.attn_metadata[layer.pool_layer])


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, output: Tensor, layer_name: str) -> None:
    return None


# A fragment: the C++ extension defines its ops in the same namespace.
_library = torch.library.Library("lola", "FRAGMENT")
direct_register_custom_op(
    op_name="attention",
    op_func=_attention,
    mutates_args=["output"],
    fake_impl=_attention_fake,
    target_lib=_library,
)
