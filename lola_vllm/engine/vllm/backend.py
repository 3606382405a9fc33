"""The attention backend that vLLM asks for by name, and the metadata of a step.

vLLM's metadata for Mamba layers already says what LoLA needs: which rows decode and which prefill,
their state indices, lengths and query offsets. This adds the host-side copies from which a prefill
is planned without waiting for the device.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.mamba_attn import (
    BaseMambaAttentionMetadata,
    BaseMambaAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from lola_vllm.core.ops import Backend, DecodeBatch, PrefillBatch, choose_backend, context_shift
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.engine.vllm.cache import lola_hf_config
from lola_vllm.engine.vllm.compat import BACKEND_NAME
from lola_vllm.engine.vllm.waypoints import Waypoint

GRAPHS_ENV = "LOLA_VLLM_CUDA_GRAPHS"


def check_capture(backend: Backend, device: str) -> None:
    """Whether whole steps can be captured, where that is wanted.

    Raises:
        ValueError: they cannot, by this back end.
    """
    if os.environ.get(GRAPHS_ENV) == "full" and not backend.capturable:
        raise ValueError(
            f"{GRAPHS_ENV} = 'full': the back end {backend.name} on {device} cannot be "
            "captured, only triton and cuda on a GPU can; unset it"
        )


@dataclass
class LolaMetadata(BaseMambaAttentionMetadata):
    """A step's rows: decodes first, each with its drafts, then prefills.

    Attributes:
        query_start_loc_d_cpu: `[num_decodes + 1]`, offsets into the decodes' tokens; None: each row
            has one, and no draft.
        query_start_loc_p_cpu: `[num_prefills + 1]`, offsets into the prefill tokens.
        context_lens_p_cpu: `[num_prefills]`, tokens already in each row's state.
        schedule: the model's; None where contexts do not shift.
        waypoints: that prefills come past. Set before the first layer runs.
    """

    query_start_loc_d_cpu: torch.Tensor | None = None
    query_start_loc_p_cpu: torch.Tensor | None = None
    context_lens_p_cpu: torch.Tensor | None = None
    schedule: ShiftSchedule | None = None
    waypoints: Sequence[Waypoint] = ()

    @functools.cached_property
    def decode_batch(self) -> DecodeBatch:
        """The rows that decode, cut out once for all layers.

        Not a field: vLLM copies metadata with other block tables in it.
        """
        assert self.state_indices_tensor_d is not None
        state_indices = self.state_indices_tensor_d[:, 0]
        return DecodeBatch(state_indices, self.seq_lens[: len(state_indices)])

    @functools.cached_property
    def decode_rounds(self) -> list[tuple[torch.Tensor | slice, DecodeBatch]]:
        """A step with drafts: where the first token of each row lies and the rows, then the second
        of those that have one, and so on.

        As decodes they are answered to the last bit as without drafts, which a prefill rounds
        otherwise.
        """
        starts = self.query_start_loc_d_cpu
        assert starts is not None
        (state_indices, seq_lens), lengths = self.decode_batch, starts.diff()
        rounds: list[tuple[torch.Tensor | slice, DecodeBatch]] = []
        for at in range(int(lengths.max())):
            rows = (lengths > at).nonzero().squeeze(1)
            tokens, left = starts[rows] + at, lengths[rows] - at - 1
            if len(rows) == 1:  # a view
                rows_d: torch.Tensor | slice = slice(int(rows), int(rows) + 1)
                tokens_d: torch.Tensor | slice = slice(int(tokens), int(tokens) + 1)
            else:
                rows_d, tokens_d = rows.to(seq_lens.device), tokens.long().to(seq_lens.device)
            batch = DecodeBatch(state_indices[rows_d], seq_lens[rows_d] - left.to(seq_lens))
            rounds.append((tokens_d, batch))
        return rounds

    @functools.cached_property
    def prefill_batch(self) -> PrefillBatch:
        """The rows that prefill; as `decode_batch`."""
        assert self.state_indices_tensor_p is not None
        assert self.query_start_loc_p_cpu is not None
        assert self.context_lens_p_cpu is not None
        return PrefillBatch(
            self.state_indices_tensor_p, self.query_start_loc_p_cpu, self.context_lens_p_cpu
        )

    @functools.cached_property
    def prefill_segments(self) -> list[context_shift.Segment]:
        """`prefill_batch` as context shifts and waypoints divide it."""
        return context_shift.split_prefill(self.schedule, self.prefill_batch, self._stops)

    @functools.cached_property
    def waypoints_after(self) -> dict[int, list[Waypoint]]:
        """The waypoints at the end of each of `prefill_segments`, by its number."""
        bounds = context_shift.segment_bounds(self.schedule, self.prefill_batch, self._stops)
        found = defaultdict(list)
        for row, waypoint in self._passed:
            if waypoint.num_tokens in bounds[row]:
                found[bounds[row].index(waypoint.num_tokens) - 1].append(waypoint)
        return found

    @functools.cached_property
    def _passed(self) -> list[tuple[int, Waypoint]]:
        """Waypoints, each with its row of `prefill_batch`. They alone wait for the device."""
        rows = self.prefill_batch.state_indices.tolist() if self.waypoints else []
        return [(rows.index(w.state_index), w) for w in self.waypoints if w.state_index in rows]

    @functools.cached_property
    def _stops(self) -> dict[int, list[int]]:
        stops = defaultdict(list)
        for row, waypoint in self._passed:
            stops[row].append(waypoint.num_tokens)
        return stops


class LolaMetadataBuilder(BaseMambaAttentionMetadataBuilder[LolaMetadata]):
    """Builds `LolaMetadata`.

    The model runners know the builders of vLLM's own layers by type, and hand those the counts of
    accepted drafts. LoLA's needs none: they are in the token counts.
    """

    metadata_cls = LolaMetadata
    needs_causal_conv1d_metadata = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A state takes drafts back by its count: no row has a state per draft.
        self.state_indices_tensor_d = self.state_indices_tensor_d[:, :1].contiguous()

    @functools.cached_property
    def schedule(self) -> ShiftSchedule | None:
        """The model's."""
        return ShiftSchedule.of(lola_hf_config(self.vllm_config))

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """What vLLM may capture: nothing of this layer, or whole steps that only decode.

        Raises:
            ValueError: `LOLA_VLLM_CUDA_GRAPHS` is no known choice, or the back end cannot do it.
        """
        wanted = os.environ.get(GRAPHS_ENV, "piecewise")
        if wanted not in ("piecewise", "full"):
            raise ValueError(f"{GRAPHS_ENV} = {wanted!r}: must be 'piecewise' or 'full'")
        # Not unasked: no GPU has replayed one yet (benchmarks/gpu.sh).
        if wanted == "piecewise":
            return AttentionCGSupport.NEVER
        device = vllm_config.device_config.device_type
        check_capture(choose_backend(device, vllm_config.model_config.dtype), device)
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> LolaMetadata:
        """vLLM's metadata plus the host-side prefill plan."""
        if self.use_spec_decode:  # else rows of several tokens would be prompts
            kwargs["num_accepted_tokens"] = torch.ones_like(common_attn_metadata.seq_lens)
        if (
            self.compilation_config.cudagraph_mode.has_full_cudagraphs()
            and common_attn_metadata.max_query_len == 1
            and common_attn_metadata.is_prefilling is not None
        ):
            # Such a step may replay a graph, which holds decodes only. A new prompt of one token
            # can be one of them: to the op its page is empty, whatever a former owner left there.
            common_attn_metadata = common_attn_metadata.replace(
                is_prefilling=torch.zeros_like(common_attn_metadata.is_prefilling)
            )
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        assert isinstance(metadata, LolaMetadata)  # made from `metadata_cls`
        if metadata.num_prefills:
            context_lens, query_start_loc = self._prefill_cpu_metadata(
                common_attn_metadata,
                metadata.num_reqs,
                metadata.num_prefills,
                metadata.num_decode_tokens,
            )
            metadata.context_lens_p_cpu = context_lens
            metadata.query_start_loc_p_cpu = query_start_loc
        if metadata.num_decode_tokens > metadata.num_decodes:
            starts = common_attn_metadata.query_start_loc_cpu[: metadata.num_decodes + 1]
            metadata.query_start_loc_d_cpu = starts
        metadata.schedule = self.schedule
        if self.schedule is not None and metadata.num_decodes:
            self._shift_decodes(metadata, common_attn_metadata)
        return metadata

    def _shift_decodes(self, metadata: LolaMetadata, common: CommonAttentionMetadata) -> None:
        """Shift the pages of the rows whose new token needs it, in all layers of the rank.

        Here and not in the layers, as a CUDA graph may replay these. vLLM has copied states across
        block boundaries before it builds metadata.
        """
        seq_lens, state_indices = common.seq_lens_cpu_upper_bound, metadata.state_indices_tensor_d
        assert seq_lens is not None and state_indices is not None
        rows = metadata.num_decodes
        seq_lens = seq_lens[:rows] - common.query_start_loc_cpu[: rows + 1].diff()
        first = self.compilation_config.static_forward_context[self.layer_names[0]]
        layers = [layer.state for layer in first.sharing]
        context_shift.shift_due(layers, state_indices[:rows, 0], seq_lens, first.ops.shift)


class LolaAttentionBackend(AttentionBackend):
    """Names the builder; the layer itself (`attention.py`) runs the ops."""

    @staticmethod
    def get_name() -> str:
        """The name under which `compat.register_mamba_backend` registers this class."""
        return BACKEND_NAME

    @staticmethod
    def get_builder_cls() -> type[LolaMetadataBuilder]:
        """The metadata builder."""
        return LolaMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """A state-space-like backend: one state per sequence, no per-token blocks."""
        return True
