"""The attention backend that vLLM asks for by name, and the metadata of a step.

vLLM's metadata for short-convolution layers already says what LoLA needs: which rows decode and
which prefill, their slots, lengths and query offsets. This adds the host-side copies from which a
prefill is planned without waiting for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.short_conv_attn import (
    ShortConvAttentionMetadata,
    ShortConvAttentionMetadataBuilder,
)

from lola_vllm.compat import BACKEND_NAME


@dataclass
class LolaMetadata(ShortConvAttentionMetadata):
    """A step's rows: decodes first, then prefills.

    Attributes:
        query_start_loc_p_cpu: `[num_prefills + 1]`, offsets into the prefill tokens.
        context_lens_p_cpu: `[num_prefills]`, tokens already in each row's state.
    """

    query_start_loc_p_cpu: torch.Tensor | None = None
    context_lens_p_cpu: torch.Tensor | None = None


class LolaMetadataBuilder(ShortConvAttentionMetadataBuilder):
    """Builds `LolaMetadata`.

    A subclass of the short-convolution builder because the model runners look for it by type when
    they hand over what a hybrid model needs.
    """

    metadata_cls = LolaMetadata
    needs_causal_conv1d_metadata = False
    # The torch and C++ paths cannot be captured; back ends that can raise this.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> LolaMetadata:
        """vLLM's metadata plus the host-side prefill plan."""
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
        return metadata


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
