"""The earlier name of `lola_vllm.plugin.backend`, kept for code that imports it."""

from lola_vllm.plugin.backend import LolaAttentionBackend, LolaMetadata, LolaMetadataBuilder

__all__ = ["LolaAttentionBackend", "LolaMetadata", "LolaMetadataBuilder"]
