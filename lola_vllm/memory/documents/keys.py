"""The keys of a document in the heads that hold many pairs.

A state has the pairs of all heads, and H and s. To ask which documents a question reads, the keys
of the few heads that hold most pairs are enough, at a byte a number. They are kept apart, so that
choosing among a thousand documents reads no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.ops.int8 import Int8Rows, quantize
from lola_vllm.core.ops.portable import compute_dtype
from lola_vllm.core.ops.rope_table import RopeTable
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.state import StateLayout
from lola_vllm.memory.sessions.cipher import StateKey, is_sealed, open_file, sealed_file
from lola_vllm.memory.sessions.partial import write_aside

# A reading head holds at least this share of the pairs that the largest head holds, and lies in
# this share of the layers: those behind find nothing that is not found before (docs/library.md).
READING_SHARE = 0.25
READING_LAYERS = 2 / 3
_PAIR_BYTES = 8  # of a pair's scale and position
# Of a file: those of all heads, one behind the other. So one is opened in the time of a head.
_TENSORS = {"num_tokens", "counts", "keys", "scale", "positions", "state"}


class KeysError(ValueError):
    """Keys that cannot be taken or read; the message says what to do."""


T = TypeVar("T")


class Fetched(Sequence[T]):
    """What is not kept: each is fetched anew when it is asked for.

    Args:
        count: how many there are. take: fetches one, by its index from 0 on.
    """

    def __init__(self, count: int, take: Callable[[int], T]) -> None:
        self._count, self._take = count, take

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._take(range(self._count)[index])


class ReadingHead(NamedTuple):
    """A sparse set that holds many pairs.

    Attributes:
        layer, kv_head: of the model (of this rank). page: its index among all pages of a state.
        sparse_head: in its page.
    """

    layer: int
    kv_head: int
    page: int
    sparse_head: int


def reading_heads(sequence: SequenceLayout) -> list[ReadingHead]:
    """The heads of a model whose keys are kept, in order."""
    found, page_index = list[ReadingHead](), 0
    largest = max(page.sparse_cache_size for page in sequence.layouts)
    layers = math.ceil(READING_LAYERS * len(sequence.layers))
    for layer, layout in enumerate(sequence.layers):
        kv_head = 0
        for page in layout.pages:
            if page.sparse_cache_size >= max(1, READING_SHARE * largest):
                share = page.num_sparse_heads // page.num_kv_heads
                found += [
                    ReadingHead(layer, kv_head + i // share, page_index, i)
                    for i in range(page.num_sparse_heads)
                ]
            kv_head += page.num_kv_heads
            page_index += 1
    return [head for head in found if head.layer < layers] or found


def key_bytes(sequence: SequenceLayout, num_tokens: int) -> int:
    """Bytes of the keys of a document, their scales and positions."""
    n, total = torch.tensor(num_tokens), 0
    pages = sequence.layouts
    for head in reading_heads(sequence):
        page = pages[head.page]
        window = num_tokens - min(int(page.window_start(n)), num_tokens)
        total += (int(page.num_sparse(n)) + window) * (page.head_dim + _PAIR_BYTES)
    return total


def queries_in(
    sequence: SequenceLayout, seen: Mapping[int, Tensor], before: int, rope: RopeTable
) -> list[Tensor]:
    """A question's queries in each reading head, as if its first token stood at position 0.

    Args:
        seen: layer -> `[T, Hq, d]`, its queries after RoPE, of every layer that has such a head.
        before: tokens before the question. rope: of the model, in the dtype of sums.

    Returns:
        Of each reading head, `[T, G, d]` on the CPU: T tokens, G query heads that read it.
    """
    found = []
    for head in reading_heads(sequence):
        q = seen[head.layer]
        group = q.shape[1] // sequence.layers[head.layer].num_kv_heads
        own = q[:, head.kv_head * group : (head.kv_head + 1) * group].to("cpu", rope.cos.dtype)
        found.append(rope.move(own, torch.tensor(-before)))
    return found


@dataclass(frozen=True, eq=False)
class DocumentKeys:
    """Keys of a document, rotated so that it ends just before position 0.

    Attributes:
        num_tokens: of the document. keys: of each reading head, `[m, d]` int8 with scales `[m]`.
        positions: of each, `[m]` int64, in the document.
    """

    num_tokens: int
    keys: Sequence[Int8Rows]
    positions: Sequence[Tensor]

    @classmethod
    def of_state(
        cls,
        sequence: SequenceLayout,
        row: Tensor,
        num_tokens: int,
        rope: RopeTable,
        newest: int | None = None,
        schedule: ShiftSchedule | None = None,
    ) -> DocumentKeys:
        """The exact keys of a state: of its sparse caches and its window, sinks aside.

        Args:
            row: `[>= row_bytes]` uint8 on the CPU. num_tokens: that it has seen.
            rope: of the model, in the dtype of sums.
            newest: of its tokens, how many are the document; None: all.
            schedule: of context shifts, for a state of more tokens than the trained length.

        Raises:
            KeysError: the document is longer than the trained length.
        """
        own = num_tokens if newest is None else min(newest, num_tokens)
        if own > len(rope.cos):
            raise KeysError(
                f"a document of {own} tokens: at most {len(rope.cos)}, the trained length, "
                "are read as one; read it in parts"
            )
        pages, rows = sequence.layouts, sequence.split(row[None])
        keys, positions = [], []
        for head in reading_heads(sequence):
            page = pages[head.page]
            found, where = _exact_keys(page, rows[head.page], head.sparse_head, num_tokens)
            found, where = found[where >= num_tokens - own], where[where >= num_tokens - own]
            stand = where
            if schedule is not None:
                stand = schedule.exact_rope_positions(where, num_tokens, page.sink_size)
            by = where - num_tokens - stand
            found = rope.move(rope.move(found, by // 2), by - by // 2)  # each by less than P
            keys.append(quantize(found))
            positions.append(where - (num_tokens - own))
        return cls(own, tuple(keys), tuple(positions))

    def write(self, path: Path, key: StateKey | None = None, state: bytes = b"") -> int:
        """Write them to a file, which only its owner can read, and return its bytes.

        Args:
            key: to encrypt it with; None: it is not encrypted. state: what tells the state that
                they are of from others, which `read` compares.
        """
        counts = [len(positions) for positions in self.positions]
        tensors = {
            "num_tokens": torch.tensor(self.num_tokens),
            "counts": torch.tensor(counts),
            "keys": torch.cat([keys.numbers for keys in self.keys]),
            "scale": torch.cat([keys.scale for keys in self.keys]),
            "positions": torch.cat(list(self.positions)).int(),
            "state": torch.tensor(list(state), dtype=torch.uint8),
        }
        data = save(tensors)
        return write_aside(path, [data] if key is None else sealed_file(data, key))

    @classmethod
    def read(cls, path: Path, key: StateKey | None = None, state: bytes = b"") -> DocumentKeys:
        """Read the keys of a file.

        One that is not encrypted is mapped into memory, and read head by head, when a head is
        looked at.

        Args:
            key: that it was encrypted with; None: it was not. state: as it was written.

        Raises:
            KeysError: it is none, or damaged, or of another state, or has another key.
        """
        try:
            if key is None:
                file = safe_open(path, "pt")
                return cls._of_tensors(set(file.keys()), file.get_tensor, state)
            data = path.read_bytes()
            if not is_sealed(data):
                raise KeysError(f"{path.name}: it is not encrypted, and files here are")
            tensors = load(open_file(data, key))
            return cls._of_tensors(set(tensors), tensors.__getitem__, state)
        except KeysError:
            raise
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise KeysError(f"{path.name}: not the keys of a document ({error})") from None

    @classmethod
    def _of_tensors(
        cls, names: set[str], tensor: Callable[[str], Tensor], state: bytes
    ) -> DocumentKeys:
        """The keys of a file's tensors, which are taken when they are needed."""
        if names != _TENSORS:
            raise KeyError("other tensors than those of keys")
        if bytes(tensor("state").tolist()) != state:
            raise ValueError("they are of another state")
        counts: list[int] = tensor("counts").tolist()
        numbers, scales, positions = (
            tensor(name).split_with_sizes(counts) for name in ("keys", "scale", "positions")
        )
        keys = tuple(map(Int8Rows, numbers, scales))
        return cls(
            int(tensor("num_tokens")), keys, Fetched(len(keys), lambda i: positions[i].long())
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, their scales and positions."""
        return sum(k.numbers.numel() + _PAIR_BYTES * len(k.scale) for k in self.keys)


def _exact_keys(
    page: StateLayout, pages: Tensor, sparse_head: int, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Keys `[m, d]` of a sparse set and of the window beside it, by position, and positions."""
    views, n = page.views(pages), torch.tensor(num_tokens)
    m = int(page.num_sparse(n))
    dtype = compute_dtype(views.exact_k)
    sparse = views.sparse_k[0, sparse_head, :m]
    if page.int8_pairs:
        sparse = Int8Rows(sparse, views.sparse_k_scale[0, sparse_head, :m]).to(dtype)
    window = torch.arange(min(int(page.window_start(n)), num_tokens), num_tokens)
    kv_head = sparse_head * page.num_kv_heads // page.num_sparse_heads
    keys = torch.cat([sparse.to(dtype), views.exact_k[0, kv_head, page.row(window)].to(dtype)])
    positions = torch.cat([views.positions[0, sparse_head, :m].long(), window])
    order = positions.argsort()
    return keys[order], positions[order]
