"""transformers' cache of a LoLA model: the server's state pages, one per row of the batch."""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lola_vllm.core.config import DecoderConfig
from lola_vllm.core.layers import SequenceLayout, layer_layout
from lola_vllm.core.ops import (
    DecodeBatch,
    LayerState,
    LolaWeights,
    PrefillBatch,
    choose_backend,
    context_shift,
)
from lola_vllm.core.ops.compose import ComposeError
from lola_vllm.core.ops.rollback import reach
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.ops.sliding import ops_of
from lola_vllm.engine.hf.tokens import LolaModelError, NewTokens
from lola_vllm.memory.sessions.cipher import StateKey
from lola_vllm.memory.sessions.file import StateFileError, StateHeader, read_state, write_state
from lola_vllm.memory.sessions.fingerprint import Fingerprint, model_fingerprint
from lola_vllm.memory.sessions.names import check_name
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes, namespace, token_array
from lola_vllm.models.schema import settle_facts


class LolaCacheLayer(CacheLayerMixin):
    """The pages of one layer. Row b of the batch has page b + 1; page 0 is the ops' null page.

    Attributes:
        num_tokens: `[B]` int64 in host memory, tokens that each page has seen.
        num_columns: columns that each row has seen, padding included: transformers' length.
        unpadded_from: from this column on, all are tokens in every row.
        query_hook: sees the queries of each forward, `[B, Q, Hq, d]` after RoPE; None: nobody does.
    """

    is_croppable = False
    supports_early_init = False

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.lola, _ = config.for_layer(index)
        self.query_hook: Callable[[Tensor], None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget every row; the next forward may have another batch size."""
        self.is_initialized = False
        self.pages: Tensor | None = None
        self.state: LayerState | None = None
        self.num_tokens = torch.zeros(0, dtype=torch.int64)
        self.num_columns = self.unpadded_from = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate pages for keys and values `[B, Q, Hkv, d]`. They need no clearing."""
        self.allocate(len(key_states), key_states.dtype, key_states.device)

    def allocate(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate a page per row, for keys and values of a dtype."""
        self.layout = layer_layout(self.config, self.index, dtype)
        self.ops = ops_of(self.layout, choose_backend(device.type, dtype), device.type)
        self.num_tokens = torch.zeros(batch, dtype=torch.int64)
        self.pages = torch.empty(
            batch + 1, self.layout.page_bytes, dtype=torch.uint8, device=device
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
    ) -> Tensor:
        """Write the new pairs, answer the new queries, and update where it is due.

        Args:
            q: `[B, Q, Hq, d]`, k and v: `[B, Q, Hkv, d]`, q and k after RoPE.
            tokens: which of the columns are tokens.

        Returns:
            `[B, Q, Hq, d]` in q's dtype; zeros for padding.
        """
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        assert self.pages is not None
        if self.query_hook is not None:
            self.query_hook(q)
        if self.state is None or self.state.pages is not self.pages:
            self.state = LayerState.bind(weights, self.layout, self.pages)
        # Weights are of one layer, so their shapes stay.
        layer = self.state.with_weights(weights)
        state_indices = torch.arange(1, len(q) + 1, device=q.device, dtype=torch.int32)
        seen, self.num_tokens = self.num_tokens, self.num_tokens + tokens.lengths
        self.num_columns += q.shape[1]
        if tokens.mask is not None:
            self.unpadded_from = self.num_columns - tokens.last_unpadded
        dtype = self.layout.pages[0].kv_dtype  # under autocast q, k and v may differ
        rows_q, rows_k, rows_v = (tokens.pack(x).to(dtype).contiguous() for x in (q, k, v))
        out = torch.empty_like(rows_q)
        if q.shape[1] == 1 and tokens.mask is None:
            context_shift.shift_due([layer], state_indices, seen, self.ops.shift)
            batch = DecodeBatch(state_indices, self.num_tokens.to(q.device, torch.int32))
            self.ops.decode(layer, rows_q, rows_k, rows_v, batch, out)
        else:
            starts = torch.nn.functional.pad(tokens.lengths.cumsum(0), (1, 0)).int()
            prompt = PrefillBatch(state_indices, starts, seen.int())
            segments = context_shift.split_prefill(layer.schedule, prompt)
            rows = (rows_q, rows_k, rows_v)
            ops = self.ops
            context_shift.prefill(ops.prefill, layer, *rows, segments, out, shift=ops.shift)
        return tokens.unpack(out.to(q.dtype), q)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """transformers' call before attention: the new pairs alone, which `attend` writes."""
        return key_states, value_states

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

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise `LolaModelError` unless `crop` can remove so many tokens."""
        removed, interval = -tokens_to_remove, self.lola.update_interval
        why = None
        if removed < 0:
            why = "say how many tokens to remove, as a negative number"
        elif removed > self.num_columns - self.unpadded_from:
            why = "among them is padding, or they are more than the cache has seen"
        elif removed:
            schedule = ShiftSchedule.of(self.config)
            for n in self.num_tokens.tolist():
                if n > reach(n - removed, interval, schedule):
                    why = (
                        f"a state of {n} tokens does not go back to {n - removed}, as an update, "
                        f"every {interval} tokens, or a context shift lies between"
                    )
        if why is not None:
            raise LolaModelError(
                f"crop({tokens_to_remove}): {why}; a copy.deepcopy of the cache goes back anywhere"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of every row, no further than to the last update.

        Args:
            tokens_to_remove: their number, negative.

        Raises:
            LolaModelError: an update or a context shift lies between, or padding.
        """
        self.check_crop(tokens_to_remove)
        self.num_tokens = self.num_tokens + tokens_to_remove
        self.num_columns += tokens_to_remove

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


def _pages(layer: LolaCacheLayer) -> Tensor:
    assert layer.pages is not None
    return layer.pages


class LolaCache(Cache):
    """The state of a batch of sequences in every layer. Its size does not depend on lengths."""

    layers: list[LolaCacheLayer]  # type: ignore[assignment]  # narrower than transformers'

    def __init__(self, config: DecoderConfig) -> None:
        if config.name_or_path:
            settle_facts(config, config.name_or_path)  # a config that no model has seen
        layers = range(config.num_hidden_layers)
        super().__init__(layers=[LolaCacheLayer(config, index) for index in layers])
        self.composed = False  # of documents read apart: not the state of reading its tokens
        self.is_read = False  # whether a LoLA model's forward runs with it

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """transformers' call before a layer's attention; see `LolaCacheLayer.update`.

        Raises:
            LolaModelError: no LoLA model calls. Its attention would see the new pairs alone.
        """
        if not self.is_read:
            raise LolaModelError(
                "LolaCache serves LoLA models only; other models need a DynamicCache"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

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

    def fork(self, repeats: int = 1) -> LolaCache:
        """A cache with each row `repeats` times. What it reads leaves this one as it is."""
        fork = copy.copy(self)
        fork.layers = [copy.copy(layer) for layer in self.layers]
        fork.batch_repeat_interleave(repeats)  # which replaces the pages
        return fork

    def crop(self, tokens_to_remove: int) -> None:
        """`LolaCacheLayer.crop` of all layers, or of none."""
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    @classmethod
    def compose(cls, caches: Sequence[LolaCache], model: Any) -> LolaCache:
        """One cache of documents that were read apart, as if they stood one behind the other.

        `docs/algorithm.md`, section 8, says what is exact. The caches stay as they are.

        Args:
            caches: of one row each, in the order of the documents; empty ones are left out.
            model: the `LolaForCausalLM` that has read them.

        Raises:
            LolaModelError: a cache of several rows, or of another model or dtype.
            ComposeError: no document, or one that is too short.
        """
        read = [cache for cache in caches if cache.get_seq_length()]
        for number, cache in enumerate(read):
            first = cache.layers[0]
            if first.batch_size != 1:
                raise LolaModelError(
                    f"caches[{number}] has {first.batch_size} rows; compose takes one of each: use "
                    "batch_select_indices on a copy"
                )
            if first.config.to_dict() != model.config.to_dict():
                raise LolaModelError(
                    f"caches[{number}] is of another model or other parameters than `model`"
                )
            if cache.sequence != read[0].sequence:
                raise LolaModelError(
                    f"caches[{number}] holds {first.layout.pages[0].kv_dtype}, and the first "
                    f"{read[0].layers[0].layout.pages[0].kv_dtype}: read all in one dtype"
                )
        if not read:
            raise ComposeError("no document to compose: no cache has seen tokens")
        sequence, composed = read[0].sequence, cls(model.config)
        composed.composed = len(read) > 1 or read[0].composed
        rows = [cache.rows()[0] for cache in read]
        lengths = [int(cache.layers[0].num_tokens) for cache in read]
        row, n = model.composer(sequence).compose(rows, lengths)
        for layer, like, page in zip(
            composed.layers, read[0].layers, sequence.pages(row[None]), strict=True
        ):
            layout, device = like.layout.pages[0], _pages(like).device
            layer.allocate(1, layout.kv_dtype, device)
            _pages(layer)[1:] = page
            layer.num_tokens[:] = layer.num_columns = n
        return composed

    def save(
        self,
        path: str | Path,
        tokens: Sequence[int] | Tensor,
        row: int = 0,
        session: str = "file",
        key: StateKey | None = None,
    ) -> int:
        """Write the state of a row to a file, which a server can take up, and return its bytes.

        Args:
            path: it is replaced. tokens: ids that the row has seen. row: of the batch.
            session: name that the file tells. key: to encrypt it with.

        Raises:
            LolaModelError: the cache is empty, or the row has seen another number of tokens.
            SessionNameError: `session` is no name that a session can have.
            CheckpointError: the model's weights are in no directory, so the state would fit none.
            OSError: the file cannot be written.
        """
        pages = [layer.pages for layer in self.layers]
        if any(page is None for page in pages):
            raise LolaModelError("the cache has seen no tokens; there is no state to save")
        ids = token_array([int(token) for token in tokens])
        n = int(self.layers[0].num_tokens[row])
        if len(ids) != n:
            raise LolaModelError(f"tokens: {len(ids)}, but row {row} has seen {n}")
        fingerprint = self._fingerprint()
        new = secrets.token_hex(16)
        composed = new if self.composed else None
        hashes = PrefixHashes(namespace(fingerprint.key, composed=composed), ids)
        header = StateHeader(
            id=new,
            composed=composed,
            session=check_name(session),
            turn=1,
            kind="answer",
            num_tokens=n,
            prefix_hash=hashes.prefix_hash(n).hex(),
            block_hash=hashes.block_hash(n).hex(),
            fingerprint=fingerprint.to_dict(),
            created=time.time(),
        )
        state = torch.cat([page[row + 1].cpu() for page in pages if page is not None])
        clean = self.sequence.cleaned(state, n)
        return write_state(Path(path), header, ids, clean.numpy(), key)

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: DecoderConfig,
        device: torch.device | str = "cpu",
        key: StateKey | None = None,
    ) -> tuple[LolaCache, Tensor]:
        """A cache of one row from a file that `save` or a server wrote.

        Args:
            config: of the model, loaded from its directory. key: of an encrypted file.

        Returns:
            The cache, and the tokens that it has seen, `[n]` int64.

        Raises:
            StateFileError: the file is damaged, of another model or dtype, or of another key.
        """
        found = read_state(Path(path), key=key)
        cache = cls(config)
        cache.composed = found.header.composed is not None
        # A dtype that torch has not is told as another one than the model's.
        dtype = getattr(torch, found.header.fingerprint.get("dtype", ""), torch.float32)
        for layer in cache.layers:
            layer.allocate(1, dtype, torch.device(device))
        difference = cache._fingerprint().difference(found.header.fingerprint)
        if difference:
            raise StateFileError(Path(path), "foreign", difference)
        state = torch.from_numpy(found.data)[None].to(device)
        for layer, pages in zip(cache.layers, cache.sequence.pages(state), strict=True):
            assert layer.pages is not None
            layer.pages[1:] = pages
            layer.num_tokens[:] = layer.num_columns = len(found.tokens)
        return cache, torch.from_numpy(found.tokens).long()

    @property
    def sequence(self) -> SequenceLayout:
        """The layout of a state; there is one once the cache has seen tokens."""
        return SequenceLayout(tuple(layer.layout for layer in self.layers))

    def rows(self) -> Tensor:
        """The states of all rows `[B, row_bytes]` uint8, copied to host memory."""
        return torch.cat([_pages(layer)[1:].cpu() for layer in self.layers], dim=1)

    def _fingerprint(self) -> Fingerprint:
        first = self.layers[0]
        return model_fingerprint(
            first.config,
            str(first.config._name_or_path),
            self.sequence.layouts,
        )
