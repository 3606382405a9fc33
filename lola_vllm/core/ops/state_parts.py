"""The parts of a state's pages by head, copied out of its bytes and into them.

Pages differ in the sizes of their sparse sets, so no tensor has one part of all of them. A state is
cut into rows here, with numpy, which takes a tenth of the time of as many tensor views.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lola_vllm.core.state import StateLayout

Bytes = NDArray[np.uint8]


class StateParts:
    """Where each head's rows of a part are in a state.

    Args:
        layouts: the pages of a state, in order. Their heads are counted through: H and s have a
            state head each, the sparse parts a sparse set, the exact store a KV head.
    """

    def __init__(self, layouts: Sequence[StateLayout]) -> None:
        self._starts: dict[str, list[int]] = {}
        self._rows: dict[str, tuple[tuple[int, ...], torch.dtype, int]] = {}
        page_at = 0
        for page in layouts:
            for name, (shape, dtype) in page.parts.items():
                head_bytes = prod(shape[1:]) * dtype.itemsize
                start = page_at + page.offsets[name]
                starts = self._starts.setdefault(name, [])
                starts += [start + i * head_bytes for i in range(shape[0])]
                self._rows[name] = (shape[2:], dtype, prod(shape[2:]) * dtype.itemsize)
            page_at += page.page_bytes

    def take(
        self,
        states: Sequence[Bytes],
        name: str,
        heads: Sequence[int],
        counts: Sequence[Sequence[int]],
    ) -> Tensor:
        """The first rows of a part, of one head after the other, state by state: `[sum of counts,
        ...]`, a copy.

        Args:
            states: `[>= row_bytes]` each. heads: one or more. counts: rows of each, for each state.
        """
        shape, dtype, size = self._rows[name]
        starts = [self._starts[name][head] for head in heads]
        cuts = [
            state[start : start + count * size]
            for state, own in zip(states, counts, strict=True)
            for start, count in zip(starts, own, strict=True)
        ]
        if not any(map(len, cuts)):
            return torch.empty(0, *shape, dtype=dtype)
        return torch.from_numpy(np.concatenate(cuts)).view(dtype).view(-1, *shape)

    def put(
        self, state: Bytes, name: str, heads: Sequence[int], counts: Sequence[int], rows: Tensor
    ) -> None:
        """Write the first rows of a part.

        Args:
            rows: `[sum of counts, ...]`, of any dtype. The others: as for `take`.
        """
        _, dtype, size = self._rows[name]
        starts, source = self._starts[name], rows.to(dtype).contiguous().view(torch.uint8).numpy()
        source, at = source.reshape(-1), 0
        for head, count in zip(heads, counts, strict=True):
            end = at + count * size
            state[starts[head] : starts[head] + count * size] = source[at:end]
            at = end
