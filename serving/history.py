"""When each token entered and left a layer's sparse caches.

A page says what is in its caches now. The choices before it are made again: a state is a function
of its pairs, so the layer's own op, given the recorded pairs of a prompt, leads a page of its own
through the same states, and is stopped at update points.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.core.ops import context_shift
from lola_vllm.core.ops.contract import Backend, LayerState, PrefillBatch
from lola_vllm.serving.keys import PromptPairs

# Stops along a prompt. Every update is one, unless there are more of them.
MAX_STOPS = 256
STATE_INDEX = 1  # 0 is padding


class Residency(NamedTuple):
    """The interval in which a token is in a sparse cache.

    Attributes:
        position: of the token. entered: tokens that were read when it entered.
        left: tokens that were read when it was folded; None: it is still there.
    """

    position: int
    entered: int
    left: int | None


def stop_interval(update_interval: int, num_tokens: int) -> int:
    """Tokens between two stops: the update interval, or a multiple of it for long prompts."""
    return update_interval * max(1, -(-num_tokens // (MAX_STOPS * update_interval)))


def residencies(ops: Backend, layer: LayerState, pairs: PromptPairs) -> list[list[Residency]]:
    """Per sparse set, when tokens were in its cache, of all that are there at a stop, by position.

    Args:
        ops: the layer's. layer: its pages are not touched. pairs: all that it saw.
    """
    layout, device, n = layer.layout, layer.pages.device, len(pairs.k)
    pages = torch.zeros(STATE_INDEX + 1, layout.page_bytes, dtype=torch.uint8, device=device)
    own = LayerState.bind(layer.weights, layout, pages)
    k, v = (x.to(device) for x in pairs)
    q = k.new_zeros(n, layer.weights.num_heads, k.shape[-1])  # nobody asks
    state_indices = torch.tensor([STATE_INDEX], dtype=torch.int32, device=device)
    entered = torch.zeros(len(layout.sizes), n, dtype=torch.int64)
    left = torch.zeros_like(entered)
    held = torch.zeros_like(entered, dtype=torch.bool)
    step = stop_interval(layout.pages[0].update_interval, n)
    for start in range(0, n, step):
        stop = min(start + step, n)
        lengths = torch.tensor([0, stop - start], dtype=torch.int32)
        batch = PrefillBatch(state_indices, lengths, torch.tensor([start], dtype=torch.int32))
        tokens = slice(start, stop)
        segments = context_shift.split_prefill(own.schedule, batch)
        out = torch.empty_like(q[tokens])
        rows = (q[tokens], k[tokens], v[tokens])
        context_shift.prefill(ops.prefill, own, *rows, segments, out, shift=ops.shift)
        now = _held(own, stop, n)
        entered[now & ~held] = stop
        left[held & ~now] = stop
        held = now
    return [
        [
            Residency(p, int(entered[g, p]), int(left[g, p]) or None)
            for p in ever.nonzero()[:, 0].tolist()
        ]
        for g, ever in enumerate(entered > 0)
    ]


def _held(layer: LayerState, num_tokens: int, n: int) -> Tensor:
    """`[Hg, n]` bool: which positions are in a layer's sparse sets after so many tokens."""
    held = []
    for group in layer.groups:
        size = int(group.layout.num_sparse(torch.tensor(num_tokens)))
        positions = group.views.positions[STATE_INDEX, :, :size].long().cpu()
        held.append(torch.zeros(len(positions), n, dtype=torch.bool).scatter_(1, positions, True))
    return torch.cat(held)
