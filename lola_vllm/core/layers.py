"""The pages of a model's layers, and the row that they make for a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lola_vllm.core.state import LayerLayout, StateLayout, cut_rows

if TYPE_CHECKING:  # the ops have no use for transformers
    from lola_vllm.core.config import DecoderConfig


@dataclass(frozen=True)
class SequenceLayout:
    """The state of one sequence on one rank: its layers' pages one after the other, in one row.

    Attributes:
        layers: the pages of each of the rank's layers, in the model's order.
    """

    layers: tuple[LayerLayout, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one state."""
        return sum(layer.page_bytes for layer in self.layers)

    @property
    def full_kv_bytes_per_token(self) -> int:
        """What one token takes in a full KV cache of the same layers."""
        return sum(layer.full_kv_bytes_per_token for layer in self.layers)

    @property
    def layouts(self) -> list[StateLayout]:
        """The pages of all layers, in order."""
        return [page for layer in self.layers for page in layer.pages]

    @property
    def layer(self) -> LayerLayout:
        """The first layer of those that do not slide. They differ in `HEAD_KEYS` alone."""
        return next(layer for layer in self.layers if not layer.slides)

    @property
    def page(self) -> StateLayout:
        """The first page of `layer`."""
        return self.layer.pages[0]

    @property
    def sliding_bytes(self) -> int:
        """Bytes of the windows of sliding layers, which a full KV cache has too."""
        return sum(layer.page_bytes for layer in self.layers if layer.slides)

    def break_even_tokens(self, states: int = 1) -> int:
        """Context beyond which a full KV cache is larger than `states` states."""
        more = states * self.row_bytes - self.sliding_bytes
        return -(-more // self.full_kv_bytes_per_token)

    def pages(self, rows: Tensor) -> list[Tensor]:
        """Each layer's pages `[N, page_bytes]`, views of `rows [N, >= row_bytes]` of bytes."""
        return cut_rows(rows, self.layers)

    def split(self, rows: Tensor) -> list[Tensor]:
        """The bytes of each of `layouts`, views of `rows [..., >= row_bytes]`."""
        return cut_rows(rows, self.layouts)

    def cleaned(self, row: Tensor, num_tokens: int) -> Tensor:
        """A copy of a state in which every byte that is not valid is zero.

        A state is never cleared, so such bytes may be of another sequence's texts.

        Args:
            row: `[>= row_bytes]` uint8 on the CPU, after `num_tokens` tokens.
        """
        clean = torch.zeros_like(row)
        stored, to = row.numpy(), clean.numpy()
        page_at = 0
        for page in self.layouts:
            for first, last in page.valid_spans(num_tokens):
                to[page_at + first : page_at + last] = stored[page_at + first : page_at + last]
            page_at += page.page_bytes
        return clean


def layer_layout(
    config: DecoderConfig, index: int, kv_dtype: torch.dtype, ranks: int = 1, rank: int = 0
) -> LayerLayout:
    """The pages of a layer on one of so many tensor-parallel ranks.

    Args:
        kv_dtype: of keys and values.
    """
    lola, facts = config.for_layer(index)
    kv_heads = config.num_key_value_heads
    return LayerLayout.from_config(
        lola,
        num_kv_heads=max(1, kv_heads // ranks),
        num_state_heads=max(1, facts.num_state_heads // ranks),
        head_dim=config.head_dim,
        feature_dim=facts.feature_dim,
        kv_dtype=kv_dtype,
        importance=facts.importance,
        first_kv_head=rank * kv_heads // ranks,
    )


def layer_layouts(
    config: DecoderConfig, kv_dtype: torch.dtype, ranks: int = 1, rank: int = 0
) -> tuple[LayerLayout, ...]:
    """`layer_layout` of every layer."""
    layers = range(config.num_hidden_layers)
    return tuple(layer_layout(config, index, kv_dtype, ranks, rank) for index in layers)
