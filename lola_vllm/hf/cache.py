"""transformers' cache of a LoLA model: the server's state pages, one per row of the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lola_vllm.config import LolaLlamaConfig
from lola_vllm.hf.tokens import LolaModelError, NewTokens
from lola_vllm.ops import (
    DecodeBatch,
    LayerState,
    LolaWeights,
    PrefillBatch,
    choose_backend,
    rebase,
)
from lola_vllm.ops.places import Turn
from lola_vllm.state import StateLayout


class LolaCacheLayer(CacheLayerMixin):
    """The pages of one layer. Row b of the batch has page b + 1; page 0 is the ops' null page.

    Attributes:
        num_tokens: `[B]` int64 in host memory, tokens that each page has seen.
        num_columns: columns that each row has seen, padding included: transformers' length.
    """

    is_croppable = False
    supports_early_init = False

    def __init__(self, config: LolaLlamaConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.lola = config.lola.for_layer(index)
        self.reset()

    def reset(self) -> None:
        """Forget every row; the next forward may have another batch size."""
        self.is_initialized = False
        self.pages: Tensor | None = None
        self.state: LayerState | None = None
        self.num_tokens = torch.zeros(0, dtype=torch.int64)
        self.num_columns = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate pages for keys and values `[B, Q, Hkv, d]`. They need no clearing."""
        config, dtype = self.config, key_states.dtype
        state_dtype = getattr(torch, self.lola.state_dtype)
        self.layout = StateLayout.from_config(
            self.lola,
            num_kv_heads=key_states.shape[2],
            num_state_heads=self.lola.num_state_heads or config.num_attention_heads,
            head_dim=key_states.shape[3],
            kv_dtype=dtype,
            state_dtype=torch.float64 if dtype == torch.float64 else state_dtype,
        )
        self.ops = choose_backend(key_states.device.type, dtype)
        batch = len(key_states)
        self.num_tokens = torch.zeros(batch, dtype=torch.int64)
        self.pages = torch.empty(
            batch + 1, self.layout.page_bytes, dtype=torch.uint8, device=key_states.device
        )
        self.is_initialized = True

    @torch.compiler.disable  # the parts of a page are views of several types of the same bytes
    @torch.no_grad()
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: LolaWeights,
        tokens: NewTokens,
        turn: Turn | None = None,
    ) -> Tensor:
        """Write the new pairs, answer the new queries, and update where it is due.

        Args:
            q: `[B, Q, Hq, d]`, k and v: `[B, Q, Hkv, d]`, q and k after RoPE.
            tokens: which of the columns are tokens.
            turn: of rebases; None where there are none.

        Returns:
            `[B, Q, Hq, d]` in q's dtype; zeros for padding.
        """
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        assert self.pages is not None
        if self.state is None or self.state.pages is not self.pages:
            self.state = LayerState.bind(weights, self.layout, self.pages, turn)
        state = replace(self.state, weights=weights, turn=turn)  # of one layer: their shapes stay
        places = turn.places if turn is not None else None
        slots = torch.arange(1, len(q) + 1, device=q.device, dtype=torch.int32)
        seen, self.num_tokens = self.num_tokens, self.num_tokens + tokens.lengths
        self.num_columns += q.shape[1]
        dtype = self.layout.kv_dtype  # under autocast q, k and v may differ
        rows_q, rows_k, rows_v = (tokens.pack(x).to(dtype).contiguous() for x in (q, k, v))
        out = torch.empty_like(rows_q)
        if q.shape[1] == 1 and tokens.mask is None:
            due = rebase.Due.of(places, slots, seen) if places is not None else None
            if due is not None:
                rebase.rebase(state, *due)
            seq_lens = self.num_tokens.to(q.device, torch.int32)
            self.ops.decode(state, rows_q, rows_k, rows_v, DecodeBatch(slots, seq_lens), out)
        else:
            starts = torch.nn.functional.pad(tokens.lengths.cumsum(0), (1, 0)).int()
            batch = PrefillBatch(slots, starts, seen.int())
            pieces = rebase.cut(places, batch)
            rebase.prefill(self.ops.prefill, state, rows_q, rows_k, rows_v, pieces, out)
        return tokens.unpack(out.to(q.dtype), q)

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Not supported, because a page is not a list of keys and values.

        Raises:
            LolaModelError: always.
        """
        raise LolaModelError("LolaCache serves LoLA models only; other models need a DynamicCache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns of a mask over everything seen and the new ones, 0)."""
        return self.num_columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.num_columns

    def get_max_length(self) -> int:
        """-1: a page has no maximum."""
        return -1

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.num_tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens, because a state cannot undo a fold.

        Raises:
            LolaModelError: unless 0 are to be removed.
        """
        if tokens_to_remove != 0:
            raise LolaModelError(
                f"crop({tokens_to_remove}): tokens cannot be taken out of a LoLA state; keep a "
                "copy.deepcopy of the cache to go back to"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`. A page is the whole state of a sequence."""
        if self.pages is None:
            return
        rows = beam_idx.to(self.pages.device)
        self.pages = self.pages[torch.nn.functional.pad(rows + 1, (1, 0))]
        self.num_tokens = self.num_tokens[beam_idx.cpu()]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, a mask or numbers."""
        self.reorder_cache(torch.arange(self.batch_size, device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))


class LolaCache(Cache):
    """The state of a batch of sequences in every layer. Its size does not depend on lengths."""

    layers: list[LolaCacheLayer]  # type: ignore[assignment]  # narrower than transformers'

    def __init__(self, config: LolaLlamaConfig) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(layers=[LolaCacheLayer(config, index) for index in layers])

    def num_tokens(self, batch: int) -> Tensor:
        """Tokens that each of `batch` rows has seen, `[batch]` int64 in host memory.

        Raises:
            LolaModelError: the cache holds another number of rows.
        """
        layer = self.layers[0]
        if not layer.is_initialized:
            return torch.zeros(batch, dtype=torch.int64)
        if layer.batch_size != batch:
            raise LolaModelError(
                f"a batch of {batch} rows, but past_key_values holds {layer.batch_size}; "
                "start a new LolaCache"
            )
        return layer.num_tokens
