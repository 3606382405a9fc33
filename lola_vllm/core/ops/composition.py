"""Where the tokens of documents stand when their states are composed into one.

`docs/algorithm.md`, section 8, says why. `compose.py` does it to the bytes of states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.core.ops.shift_schedule import MAX_LENGTH, ShiftSchedule
from lola_vllm.core.state import StateLayout


class ComposeError(ValueError):
    """States that cannot be composed; the message names what is wrong and the remedy."""


class Rows(NamedTuple):
    """Exact pairs of a document that its page's exact store holds.

    Attributes:
        source: `[m]`, their rows. positions: `[m]`, in the document. labels: `[m]`, in the
            composition.
    """

    source: Tensor
    positions: Tensor
    labels: Tensor

    def of(self, chosen: Tensor) -> Rows:
        """The entries of a mask `[m]`."""
        return Rows(*(x[chosen] for x in self))


@dataclass(frozen=True)
class Composition:
    """Where the tokens of documents stand when they are one sequence.

    A document begins at a multiple of the update interval, as its window would not be one of the
    composition elsewhere. So the tokens of a document, but for the last one, count up to its last
    multiple of the interval. The pairs of the fewer than C tokens behind it take part all the same.

    Attributes:
        sink_size: of the model. schedule: of its context shifts; None: there are none.
        lengths: tokens of each document. offsets: position of its first token.
        evicted: pairs that have left its window.
        num_tokens, num_evicted: of the composition.
        kept, pooled: of each document, exact pairs that stay in the exact store, and that compete
            for the sparse caches.
    """

    sink_size: int
    schedule: ShiftSchedule | None
    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    evicted: tuple[int, ...]
    num_tokens: int
    num_evicted: int
    kept: tuple[Rows, ...]
    pooled: tuple[Rows, ...]

    @classmethod
    def of(
        cls,
        layout: StateLayout,
        lengths: Sequence[int],
        schedule: ShiftSchedule | None = None,
        longest: int = MAX_LENGTH,
    ) -> Composition:
        """The composition of documents of so many tokens, 1 or more each.

        Args:
            layout: of any page of the model. schedule: of context shifts; None: there are none.
            longest: tokens that a sequence can have.

        Raises:
            ComposeError: no document, one that is too short, or more tokens than `longest`.
        """
        C, sink = layout.update_interval, layout.sink_size
        if not lengths:
            raise ComposeError("no document to compose; give one or more that are not empty")
        shortest = max(C, sink)
        for index, n in enumerate(lengths[:-1]):
            if n // C * C < shortest:
                least = -(-shortest // C) * C
                raise ComposeError(
                    f"document {index + 1} has {n} tokens: those before the last one need at least "
                    f"{least}; read it with another one in one document, or put it last"
                )
        offsets = [0]
        for n in lengths[:-1]:
            offsets.append(offsets[-1] + n // C * C)
        total = offsets[-1] + lengths[-1]
        if total > longest:
            raise ComposeError(
                f"the documents have {total} tokens together, and a sequence has at most {longest} "
                "here; compose fewer"
            )
        start = int(layout.window_start(torch.tensor(total)))
        kept, pooled, evicted = [], [], []
        for index, (n, offset) in enumerate(zip(lengths, offsets, strict=True)):
            last = index == len(lengths) - 1
            window = int(layout.window_start(torch.tensor(n)))
            evicted.append(window - sink)
            held = torch.tensor([*range(min(sink, n)), *range(min(window, n), n)])
            labels = held + offset
            stays = (labels >= start) & ((held < n // C * C) | last)
            if index == 0:
                stays |= held < sink
            rows = Rows(layout.row(held), held, labels)
            kept.append(rows.of(stays))
            left = rows.of(~stays)
            pooled.append(left._replace(labels=left.labels.clamp(max=start - 1)))
        return cls(
            sink, schedule, tuple(lengths), tuple(offsets), tuple(evicted), total, start - sink,
            tuple(kept), tuple(pooled),
        )  # fmt: skip

    def moves(self, index: int, positions: Tensor, labels: Tensor) -> Tensor:
        """The number of RoPE positions by which exact keys of a document go on, int64: `[]` where
        all go on by the same number, else as `positions`.

        Args:
            index: of the document. positions: of the keys in it, any shape. labels: in the
                composition, of the same shape.
        """
        if self.schedule is None or self.num_tokens <= self.schedule.length:
            by = labels - positions
            offset = self.offsets[index]
            return torch.tensor(offset) if bool((by == offset).all()) else by
        there, here = (
            self.schedule.exact_rope_positions(x, n, self.sink_size)
            for x, n in ((labels, self.num_tokens), (positions, self.lengths[index]))
        )
        return there - here
