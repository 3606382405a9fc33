"""Reads text with a softmax model, and takes notes of what its attention looks back to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lola_vllm.eval.repeats import repeated_ngrams

ATTENTION = "lola_calibration"


class Notes(Protocol):
    """What is noted of a window."""

    def begin(self, ids: Sequence[int]) -> Tensor:
        """The tokens whose attention is noted, `[n]` int64 in order; with none the window is left
        out."""

    def add(self, layer: int, k: Tensor, v: Tensor, weights: Tensor) -> None:
        """A layer's k (after RoPE) and v `[Hkv, T, d]` and softmax weights `[Hq, n, T]` of the
        tokens that `begin` named."""


class _Window(NamedTuple):
    notes: Notes
    queries: Tensor


@torch.no_grad()
def read(model: Any, windows: Iterable[Sequence[int]], notes: Notes) -> None:
    """Read windows with a model whose attention is `attention`, which must be registered."""
    for ids in windows:
        queries = notes.begin(ids)
        if len(queries):
            window = _Window(notes, queries)
            model.model(torch.tensor([list(ids)]), use_cache=False, lola_window=window)


def attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lola_window: _Window,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention, `[1, H, T, d]` in and `[1, T, Hq, d]` out, with notes."""
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    out = scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True)
    queries = lola_window.queries
    logits = q[0, :, queries] @ wide_k[0].mT * q.shape[-1] ** -0.5
    later = torch.arange(q.shape[2]) > queries[:, None]
    weights = logits.masked_fill_(later, -torch.inf).softmax(-1)  # [Hq, n, T]
    lola_window.notes.add(module.layer_idx, k[0], v[0], weights)
    return out.transpose(1, 2), None


class Repeats:
    """Attention from where a text repeats an n-gram to the first time.

    Attributes:
        places: repeats that were read.
    """

    def __init__(self) -> None:
        self.places = 0
        self._sums: dict[int, Tensor] = {}  # layer -> [Hkv, Hq / Hkv]
        self._keys = torch.zeros(0, dtype=torch.long)

    def begin(self, ids: Sequence[int]) -> Tensor:
        """See `Notes`."""
        places = repeated_ngrams(ids)
        self.places += len(places)
        # The token before the last one of the n-gram asks; the last one of the first time answers.
        self._keys = torch.tensor([before for _, before in places], dtype=torch.long)
        return torch.tensor([end - 1 for end, _ in places], dtype=torch.long)

    def add(self, layer: int, k: Tensor, v: Tensor, weights: Tensor) -> None:
        """See `Notes`."""
        found = weights[:, torch.arange(len(self._keys)), self._keys]
        self._sums[layer] = self._sums.get(layer, 0) + found.sum(-1).unflatten(0, (len(k), -1))

    def mass(self) -> list[list[float]]:
        """Per layer and KV head, the largest mean of its query heads."""
        return [(self._sums[i].amax(1) / self.places).tolist() for i in sorted(self._sums)]
