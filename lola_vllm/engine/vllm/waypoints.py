"""Waypoints: places inside of a prompt whose states are kept while it is read.

A prompt that ends otherwise than an earlier one finds no state where the two part, as nobody knew
of that place. So states are kept a little before the end of a long prompt, and before a longer end.
A step that comes past a waypoint is not divided: each layer copies its pages between two segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.memory.sessions.prefix_hash import HASH_BLOCK

# Parts of a prompt that may end otherwise: a last message, and a long one.
ENDS = (16, 4)


@dataclass(frozen=True)
class WaypointPlan:
    """Where a model's prompts have waypoints, and what else the states at their ends are good for.

    Attributes:
        interval: C, tokens between two updates. schedule: of context shifts; None: there are none.
        keeps: whether there are waypoints at all.
    """

    interval: int = 1
    schedule: ShiftSchedule | None = None
    keeps: bool = False

    def covers_one_less(self, num_tokens: int) -> bool:
        """Whether the state after n tokens is also the one after n - 1.

        A token that no update follows only adds its pair to the window, where a page with fewer
        tokens does not read it.
        """
        shifted = self.schedule is not None and self.schedule.due(num_tokens - 1)
        return num_tokens % self.interval != 0 and not shifted

    def waypoints(self, start: int, num_tokens: int) -> list[int]:
        """Token counts of a prompt at which states are kept, in order.

        Each saves `HASH_BLOCK` tokens or more. The last is before the last token if the state at
        the end does not cover that: the same prompt may come again.

        Args:
            start: tokens that are not computed. num_tokens: of the prompt.
        """
        if not self.keeps:
            return []
        ends = [num_tokens - -(-num_tokens // share) for share in ENDS]
        found = [n // self.interval * self.interval for n in ends]
        if found[0] - found[1] < HASH_BLOCK:
            found.pop()
        if not self.covers_one_less(num_tokens):
            found.append(num_tokens - 1)
        return sorted({n for n in found if n - start >= HASH_BLOCK})


class Waypoint:
    """A state that is copied in the middle of a step, layer by layer.

    Args:
        state_index: in the pool. num_tokens: of the state.
        row: `[>= row_bytes]` bytes to copy it to, on the pool's device. sequence: what is in it.
    """

    def __init__(
        self, state_index: int, num_tokens: int, row: Tensor, sequence: SequenceLayout
    ) -> None:
        self.state_index = state_index
        self.num_tokens = num_tokens
        self.row = row
        self._parts = [pages[0] for pages in sequence.pages(row[None])]
        self._copied: set[int] = set()

    @property
    def complete(self) -> bool:
        """Whether all layers have copied their pages."""
        return len(self._copied) == len(self._parts)

    def copy(self, layer: int, pages: Tensor) -> None:
        """Copy a layer's part of the state.

        Args:
            layer: of the rank, from 0 on. pages: `[N, page_bytes]` bytes, the layer's in the pool.
        """
        part = self._parts[layer]
        part.copy_(pages[self.state_index, : len(part)].view(torch.uint8))
        self._copied.add(layer)
