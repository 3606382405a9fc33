"""Where a prompt is cut: at the update points that evict something.

Between two of them the window's start, the sparse cache and the hidden state stand still.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lola_vllm.core.state import StateLayout

Ints = npt.NDArray[np.int64]


def plan_chunks(query_start_loc: Ints, context_lens: Ints, layout: StateLayout) -> Ints:
    """Cut a ragged batch at its update points, as `prefill.prefill_kernel` does.

    A chunk ends at the next update point that evicts something, so a prompt's first chunk may span
    several intervals; sinks, window and chunk together always fit the exact store.

    Args:
        query_start_loc: `[R + 1]`. context_lens: `[R]`.

    Returns:
        `[4, P]`, in the order of the tokens: of each chunk its first token in the batch, that
        token's position, the number of tokens, and the row.
    """
    eta, C, sink = layout.window_size, layout.update_interval, layout.sink_size
    lengths = np.diff(query_start_loc)
    ends = context_lens + lengths
    first_due = -(-(eta + sink + 1) // C) * C  # no earlier point evicts
    due = np.maximum((context_lens // C + 1) * C, first_due)
    counts = np.where(lengths > 0, 1 + np.maximum(-(-(ends - due) // C), 0), 0)

    rows = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.where(nth == 0, context_lens[rows], due[rows] + (nth - 1) * C)
    stops = np.minimum(ends[rows], due[rows] + nth * C)
    tokens = query_start_loc[rows] + starts - context_lens[rows]
    return np.stack([tokens, starts, stops - starts, rows])
