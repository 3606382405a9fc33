"""The first name of `lola_vllm.plugin.backend`; imports of it go on working."""

from lola_vllm.plugin.backend import LolaAttentionBackend, LolaMetadata, LolaMetadataBuilder

__all__ = ["LolaAttentionBackend", "LolaMetadata", "LolaMetadataBuilder"]
