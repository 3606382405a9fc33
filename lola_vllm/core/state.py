"""The state page: every byte that one layer keeps of one sequence, and what is valid in it.

A page is a pure function of the token prefix. It holds no counter: how many entries are valid
follows from n, the number of tokens the page has seen (`num_sparse`, `num_folded`), so a page never
needs clearing and its leftover bytes are never read. Shapes are written here once.

One page, in this order (each part starts at a multiple of 64 bytes):

    H          [Hs, 2F, d]          state dtype    hidden state, sum of phi(k) v^T
    s          [Hs, 2F]             state dtype    normalizer, sum of phi(k)
    positions  [Hg, lam]            int32          position of each sparse pair (entries unordered)
    score_weights  [Hg, lam]        float32        what multiplies the score of each sparse pair
    sparse_k_scale  [Hg, lam]       float32        what multiplies the numbers of each sparse key
    sparse_v_scale  [Hg, lam]       float32        and value
    sparse_k   [Hg, lam, d]         model dtype    sparse cache; or int8
    sparse_v   [Hg, lam, d]         model dtype
    exact_k    [Hkv, sink + ring, d]  model dtype  pinned sinks, then the window ring
    exact_v    [Hkv, sink + ring, d]  model dtype

`score_weights` is empty unless the model has an importance or contexts shift. A pair's is its
importance when it leaves the window, or 1 without one. Only context shifts change it: scores decay.

The scales are empty unless sparse pairs are int8 (`lola_vllm/core/ops/int8.py`).

The ring has eta + C rows: an update follows each C-th token at once, so no more pairs than that are
ever in the window. Position p lies in row p while p < sink, else in row sink + p mod (eta + C).

A page without a hidden state (F = 0) drops the pairs for which its sparse sets have no room. A
sliding layer's has neither: it drops all that leave its window.

Symbols: Hkv `num_kv_heads`, Hs `num_state_heads`, Hg `num_sparse_heads`, d `head_dim`, F
`feature_dim`, eta `window_size`, lam `sparse_cache_size`, C `update_interval`, sink `sink_size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.core.lola_config import LolaConfig

PART_ALIGNMENT = 64  # bytes; a cache line, and a multiple of every vector width used
PAGE_ALIGNMENT = 256  # bytes


class StateViews(NamedTuple):
    """Typed views of a pool of pages; dim 0 is the page, its stride is the page stride."""

    H: Tensor
    s: Tensor
    positions: Tensor
    score_weights: Tensor
    sparse_k_scale: Tensor
    sparse_v_scale: Tensor
    sparse_k: Tensor
    sparse_v: Tensor
    exact_k: Tensor
    exact_v: Tensor


PARTS = StateViews._fields  # the parts of a page, in its order

# What a row of `LayerLayout.table` holds: the fields of `PageLayout` in csrc/layout.h, in its
# order. A name of `PARTS` stands for the byte offset of that part in the layer's bytes.
TABLE_FIELDS = (
    "num_heads", "num_kv_heads", "num_state_heads", "num_sparse_heads", "head_dim", "feature_dim",
    "window_size", "sparse_cache_size", "recent_size", "folds_after", "update_interval",
    "sink_size", "subtract_max", "has_score_weights", "rotated_map_after", "kv_dtype",
    "sparse_dtype", "state_dtype", "page_bytes", *PARTS,
)  # fmt: skip

NEVER = 2**62  # as many tokens no page has

# Dtypes as the table names them: `DType` in csrc/layout.h.
DTYPE_CODES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int8: 4,
}  # fmt: skip


@dataclass(frozen=True)
class StateLayout:
    """Shapes, dtypes and byte offsets of one page.

    Attributes:
        window_size, sparse_cache_size, recent_size, update_interval, sink_size: as in `LolaConfig`.
        num_kv_heads, num_state_heads, num_sparse_heads: Hkv, Hs, Hg of this rank.
        head_dim: d. feature_dim: F.
        kv_dtype: dtype of keys and values. state_dtype: dtype of H and s.
        has_score_weights: scores are weighted by an importance or decay at context shifts; pages
            keep the product of both per sparse pair.
        int8_pairs: sparse pairs are rounded to int8, and pages keep their scales.
    """

    window_size: int
    sparse_cache_size: int
    update_interval: int
    sink_size: int
    num_kv_heads: int
    num_state_heads: int
    num_sparse_heads: int
    head_dim: int
    feature_dim: int
    kv_dtype: torch.dtype
    state_dtype: torch.dtype
    has_score_weights: bool = False
    int8_pairs: bool = False
    recent_size: int = 0

    @classmethod
    def from_config(
        cls,
        config: LolaConfig,
        num_kv_heads: int,
        num_state_heads: int,
        head_dim: int,
        feature_dim: int,
        kv_dtype: torch.dtype,
        importance: bool = False,
    ) -> StateLayout:
        """Layout for the head counts of one rank.

        Args:
            config: of one layer or head. importance: whether the layer has importance weights.
            feature_dim: of the layer's maps. The others: as the attributes. H and s are float64
                where keys and values are.
        """
        return cls(
            window_size=config.window_size,
            sparse_cache_size=config.sparse_pairs,
            update_interval=config.update_interval,
            sink_size=config.sink_size,
            num_kv_heads=num_kv_heads,
            num_state_heads=num_state_heads,
            num_sparse_heads=config.num_sparse_heads(num_state_heads, num_kv_heads),
            head_dim=head_dim,
            feature_dim=feature_dim if config.hidden_state else 0,
            kv_dtype=kv_dtype,
            state_dtype=torch.promote_types(kv_dtype, torch.float32),
            has_score_weights=importance or config.context_shift > 0,
            int8_pairs=config.sparse_dtype == "int8",
            recent_size=config.recent_pairs,
        )

    @property
    def ring_size(self) -> int:
        """Rows of the window ring: eta + C."""
        return self.window_size + self.update_interval

    @property
    def sparse_dtype(self) -> torch.dtype:
        """The dtype of the keys and values in the sparse cache."""
        return torch.int8 if self.int8_pairs else self.kv_dtype

    @property
    def folds_after(self) -> int:
        """Pairs of a sparse set that leave the window before any is folded: lam, or without a
        hidden state more than there are int32 positions for."""
        return self.sparse_cache_size if self.feature_dim else 2**31 - 1

    @cached_property
    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of each part, in page order (the fields of `StateViews`)."""
        exact = (self.num_kv_heads, self.sink_size + self.ring_size, self.head_dim)
        sparse = (self.num_sparse_heads, self.sparse_cache_size, self.head_dim)
        features = 2 * self.feature_dim
        scaled = self.sparse_cache_size if self.int8_pairs else 0
        wide = torch.promote_types(self.kv_dtype, torch.float32)
        return {
            "H": ((self.num_state_heads, features, self.head_dim), self.state_dtype),
            "s": ((self.num_state_heads, features), self.state_dtype),
            "positions": (sparse[:2], torch.int32),
            "score_weights": ((sparse[0], sparse[1] if self.has_score_weights else 0), wide),
            "sparse_k_scale": ((sparse[0], scaled), torch.float32),
            "sparse_v_scale": ((sparse[0], scaled), torch.float32),
            "sparse_k": (sparse, self.sparse_dtype),
            "sparse_v": (sparse, self.sparse_dtype),
            "exact_k": (exact, self.kv_dtype),
            "exact_v": (exact, self.kv_dtype),
        }

    @cached_property
    def part_bytes(self) -> dict[str, int]:
        """Name -> bytes of each part, without alignment."""
        return {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in self.parts.items()}

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Name -> byte offset of each part in the page."""
        offsets, end = {}, 0
        for name, nbytes in self.part_bytes.items():
            offsets[name] = end
            end = _align(end + nbytes, PART_ALIGNMENT)
        return offsets

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: one sequence, one layer."""
        last = list(self.parts)[-1]
        return _align(self.offsets[last] + self.part_bytes[last], PAGE_ALIGNMENT)

    def views(self, pages: Tensor) -> StateViews:
        """Typed views of raw pages.

        Args:
            pages: `[N, >= page_bytes]` of a one-byte dtype; the row stride must be a multiple of 8.

        Raises:
            ValueError: the rows are too short or not bytes.
        """
        _check_bytes(pages, self.page_bytes)
        offsets, nbytes = self.offsets, self.part_bytes
        views = {}
        for name, (shape, dtype) in self.parts.items():
            part = pages[:, offsets[name] : offsets[name] + nbytes[name]]
            if nbytes[name]:
                views[name] = part.view(dtype).unflatten(1, shape)
            else:
                views[name] = part.new_empty(pages.shape[0], *shape, dtype=dtype)
        return StateViews(**views)

    def table_row(
        self, num_heads: int, subtract_max: bool, rotated_map_after: int, offset: int
    ) -> list[int]:
        """A row of `LayerLayout.table`: a number for each of `TABLE_FIELDS`.

        Args:
            num_heads: of the page. offset: of the page in the layer's bytes, which is in the parts'
                offsets and in `page_bytes`, where the page ends.
        """
        numbers = {
            **self.__dict__,
            **{name: offset + start for name, start in self.offsets.items()},
            "num_heads": num_heads,
            "folds_after": self.folds_after,
            "subtract_max": subtract_max,
            "rotated_map_after": rotated_map_after,
            "kv_dtype": DTYPE_CODES[self.kv_dtype],
            "sparse_dtype": DTYPE_CODES[self.sparse_dtype],
            "state_dtype": DTYPE_CODES[self.state_dtype],
            "page_bytes": offset + self.page_bytes,
        }
        return [int(numbers[name]) for name in TABLE_FIELDS]

    def row(self, position: Tensor) -> Tensor:
        """Row of `exact_k` / `exact_v` that holds a position, any integer shape."""
        ring = self.sink_size + position % self.ring_size
        return torch.where(position < self.sink_size, position, ring)

    def window_start(self, n: Tensor) -> Tensor:
        """First position of the window after n tokens, pinned sinks aside."""
        C = self.update_interval
        return (n // C * C - self.window_size).clamp(min=self.sink_size)

    def update_due(self, n: Tensor) -> Tensor:
        """Whether the n-th token is followed by an update that evicts anything."""
        C = self.update_interval
        moves = (n % C == 0) & (self.window_start(n) > self.window_start(n - C))
        return moves & (self.feature_dim > 0 or self.sparse_cache_size > 0)

    def num_evicted(self, n: Tensor) -> Tensor:
        """Pairs that left the window for the sparse cache or the hidden state after n tokens."""
        return self.window_start(n) - self.sink_size

    def num_sparse(self, n: Tensor) -> Tensor:
        """Valid sparse entries after n tokens (entries 0 .. this - 1)."""
        return self.num_evicted(n).clamp(max=self.sparse_cache_size)

    def num_folded(self, n: Tensor) -> Tensor:
        """Pairs in the hidden state after n tokens; 0 means H and s hold leftovers."""
        folded = self.num_evicted(n) - self.sparse_cache_size
        return folded.clamp(min=0) * (self.feature_dim > 0)

    def valid_spans(self, num_tokens: int) -> list[tuple[int, int]]:
        """Bytes [first, last) of a page that are valid after `num_tokens` tokens, in order.

        Plain numbers: a thread that asks for them holds up the engine's.
        """
        n = torch.tensor(num_tokens)
        sparse = [(0, int(self.num_sparse(n)))]
        whole = [(0, 2 * self.feature_dim)] if self.num_folded(n) > 0 else []
        start = min(int(self.window_start(n)), num_tokens)
        # The window's rows go on at the ring's start where they reach its end.
        sink, end = self.sink_size, self.sink_size + self.ring_size
        oldest = int(self.row(torch.tensor(start)))
        newest = oldest + num_tokens - start
        exact = [
            (0, min(num_tokens, sink)),
            (sink, sink + max(0, newest - end)),
            (oldest, min(newest, end)),
        ]
        rows = {"H": whole, "s": whole, "exact_k": exact, "exact_v": exact}
        spans, offsets = [], self.offsets
        for name, (shape, dtype) in self.parts.items():
            heads, num_rows = shape[:2]
            if not num_rows:
                continue  # some layouts lack some of these parts
            row_bytes = prod(shape[2:]) * dtype.itemsize
            for i in range(heads):
                at = offsets[name] + i * num_rows * row_bytes
                spans += [
                    (at + first * row_bytes, at + last * row_bytes)
                    for first, last in rows.get(name, sparse)
                    if last > first
                ]
        return spans


@dataclass(frozen=True)
class LayerLayout:
    """The state of one sequence in one layer of a rank: one page for all of its KV heads, or a page
    for each of them, one after the other, where `HEAD_KEYS` of `LolaConfig` differ.

    Attributes:
        pages: one, or one per KV head in order. They differ in `sparse_cache_size`, `recent_size`
            and `feature_dim` alone, which is 0 without a hidden state.
    """

    pages: tuple[StateLayout, ...]

    @classmethod
    def from_config(
        cls,
        config: LolaConfig,
        num_kv_heads: int,
        num_state_heads: int,
        head_dim: int,
        feature_dim: int,
        kv_dtype: torch.dtype,
        importance: bool = False,
        first_kv_head: int = 0,
    ) -> LayerLayout:
        """Layout for the heads of one rank.

        Args:
            config: of one layer (`LolaConfig.for_layer`). first_kv_head: of the rank, in the model.
            num_kv_heads and those after: as for `StateLayout.from_config`.
        """
        heads = config.for_heads()
        own = heads[first_kv_head : first_kv_head + num_kv_heads] if len(heads) > 1 else heads
        share = len(own)
        return cls(
            tuple(
                StateLayout.from_config(
                    head, num_kv_heads // share, num_state_heads // share, head_dim, feature_dim,
                    kv_dtype, importance,
                )
                for head in own
            )
        )  # fmt: skip

    @property
    def num_kv_heads(self) -> int:
        """Hkv of the rank."""
        return sum(page.num_kv_heads for page in self.pages)

    @property
    def num_state_heads(self) -> int:
        """Hs of the rank."""
        return sum(page.num_state_heads for page in self.pages)

    @property
    def feature_dim(self) -> int:
        """F of the heads that have a hidden state; 0 where none has."""
        return max(page.feature_dim for page in self.pages)

    @property
    def slides(self) -> bool:
        """Whether this is a sliding layer: a window alone."""
        return not self.feature_dim and not self.pages[0].sparse_cache_size

    @property
    def sizes(self) -> list[int]:
        """Pairs that each sparse set holds at most."""
        return [page.sparse_cache_size for page in self.pages for _ in range(page.num_sparse_heads)]

    @property
    def offsets(self) -> list[int]:
        """Byte offset of each page in the layer's bytes; multiples of `PAGE_ALIGNMENT`."""
        return [0, *accumulate(page.page_bytes for page in self.pages)][:-1]

    @property
    def page_bytes(self) -> int:
        """Bytes of one sequence in the layer."""
        return sum(page.page_bytes for page in self.pages)

    @property
    def full_kv_bytes_per_token(self) -> int:
        """What one token takes in a full KV cache of the same layer; 0 in a sliding one, which
        keeps its window."""
        pair = 2 * self.pages[0].head_dim * self.pages[0].kv_dtype.itemsize
        return self.num_kv_heads * pair * (not self.slides)

    def table(self, num_heads: int, subtract_max: bool, rotated_map_after: int = NEVER) -> Tensor:
        """The layout as C++ and CUDA read it: int64 `[len(pages), len(TABLE_FIELDS)]`, with offsets
        in the layer's bytes.

        Args:
            num_heads: Hq. subtract_max: as in `LolaWeights`. rotated_map_after: pages with more
                tokens use the rotated key map; `NEVER`: none do.

        Raises:
            KeyError: keys and values, or H and s, have a dtype that is not in `DTYPE_CODES`.
        """
        own = num_heads // len(self.pages)
        return torch.tensor(
            [
                page.table_row(own, subtract_max, rotated_map_after, offset)
                for page, offset in zip(self.pages, self.offsets, strict=True)
            ]
        )

    def split(self, rows: Tensor) -> list[Tensor]:
        """The bytes of each page `[..., page_bytes]`, views of `rows [..., >= page_bytes]`."""
        return cut_rows(rows, self.pages)


def cut_rows(rows: Tensor, parts: Sequence[StateLayout | LayerLayout]) -> list[Tensor]:
    """Views of rows `[..., bytes]`, one for each of the parts, which lie one after the other."""
    sizes = [part.page_bytes for part in parts]
    _check_bytes(rows, sum(sizes))
    return list(rows[..., : sum(sizes)].split(sizes, dim=-1))


def _check_bytes(pages: Tensor, nbytes: int) -> None:
    if pages.dtype.itemsize != 1 or pages.shape[-1] < nbytes:
        raise ValueError(
            f"pages {tuple(pages.shape)} of {pages.dtype}: need rows of at least {nbytes} bytes"
        )


def _align(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
