"""Reads text with a softmax model, and takes notes of what its attention looks back to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lola_vllm.calibrate.saliency import SaliencyFit
from lola_vllm.eval.repeats import repeated_ngrams

ATTENTION = "lola_calibration"


class Notes(Protocol):
    """What is noted of a window."""

    def begin(self, ids: Sequence[int]) -> bool:
        """Whether there is something to note of a window, which is read next if so."""

    def add(self, layer: int, k: Tensor, v: Tensor, weights: Tensor) -> None:
        """A layer's k (after RoPE) and v `[Hkv, T, d]` and softmax weights `[Hq, T, T]`."""


@torch.no_grad()
def read(model: Any, windows: Iterable[Sequence[int]], notes: Notes) -> None:
    """Read windows with a model whose attention is `attention`, which must be registered."""
    for ids in windows:
        if notes.begin(ids):
            model.model(torch.tensor([list(ids)]), use_cache=False, lola_notes=notes)


def attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lola_notes: Notes,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention, `[1, H, T, d]` in and `[1, T, Hq, d]` out, with notes."""
    group = q.shape[1] // k.shape[1]
    logits = q[0] @ k[0].repeat_interleave(group, dim=0).mT * q.shape[-1] ** -0.5
    later = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
    weights = logits.masked_fill_(later, -torch.inf).softmax(-1)  # [Hq, T, T]
    lola_notes.add(module.layer_idx, k[0], v[0], weights)
    out = weights @ v[0].repeat_interleave(group, dim=0)
    return out.transpose(0, 1).unsqueeze(0), None


class Repeats:
    """Attention from where a text repeats an n-gram to the first time.

    Attributes:
        places: repeats that were read.
    """

    def __init__(self) -> None:
        self.places = 0
        self._sums: dict[int, Tensor] = {}  # layer -> [Hkv, Hq / Hkv]
        self._queries = self._keys = torch.zeros(0, dtype=torch.long)

    def begin(self, ids: Sequence[int]) -> bool:
        """See `Notes`."""
        places = repeated_ngrams(ids)
        self.places += len(places)
        # The token before the last one of the n-gram asks; the last one of the first time answers.
        self._queries = torch.tensor([end - 1 for end, _ in places], dtype=torch.long)
        self._keys = torch.tensor([before for _, before in places], dtype=torch.long)
        return bool(places)

    def add(self, layer: int, k: Tensor, v: Tensor, weights: Tensor) -> None:
        """See `Notes`."""
        found = weights[:, self._queries, self._keys].sum(-1).unflatten(0, (len(k), -1))
        self._sums[layer] = self._sums.get(layer, 0) + found

    def mass(self) -> list[list[float]]:
        """Per layer and KV head, the largest mean of its query heads."""
        return [(self._sums[i].amax(1) / self.places).tolist() for i in sorted(self._sums)]


class Asked:
    """What saliency is fitted to."""

    def __init__(self) -> None:
        self._fits: dict[int, SaliencyFit] = {}

    def begin(self, ids: Sequence[int]) -> bool:
        """See `Notes`."""
        return True

    def add(self, layer: int, k: Tensor, v: Tensor, weights: Tensor) -> None:
        """See `Notes`."""
        self._fits.setdefault(layer, SaliencyFit()).add(k, v, weights)

    @property
    def fits(self) -> list[SaliencyFit]:
        """By layer."""
        return [self._fits[layer] for layer in sorted(self._fits)]
