"""Reads text with a softmax model, and takes notes of what its attention looks back to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lola_vllm.calibrate.saliency import SaliencyFit
from lola_vllm.eval.repeats import repeated_ngrams

ATTENTION = "lola_calibration"


class Reader:
    """Reads windows. Per layer it adds up attention at repeats, and what saliency is fitted to."""

    def __init__(self) -> None:
        self.places = 0
        self.fits: dict[int, SaliencyFit] = {}
        self._sums: dict[int, Tensor] = {}  # layer -> [Hq]
        self._queries = self._keys = torch.zeros(0, dtype=torch.long)

    @torch.no_grad()
    def read(self, model: Any, ids: Sequence[int]) -> None:
        """Read one window."""
        places = repeated_ngrams(ids)
        self.places += len(places)
        # The token before the last one of the n-gram asks; the last one of the first time answers.
        self._queries = torch.tensor([end - 1 for end, _ in places], dtype=torch.long)
        self._keys = torch.tensor([before for _, before in places], dtype=torch.long)
        model.model(torch.tensor([list(ids)]), use_cache=False)

    def attention(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        """Softmax attention, `[1, H, T, d]` in and `[1, T, Hq, d]` out, that takes notes."""
        group = q.shape[1] // k.shape[1]
        logits = q[0] @ k[0].repeat_interleave(group, dim=0).mT * q.shape[-1] ** -0.5
        later = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
        weights = logits.masked_fill_(later, -torch.inf).softmax(-1)  # [Hq, T, T]
        layer = module.layer_idx
        found = weights[:, self._queries, self._keys].sum(-1)
        self._sums[layer] = self._sums.get(layer, 0) + found
        self.fits.setdefault(layer, SaliencyFit()).add(k[0], v[0], weights)
        out = weights @ v[0].repeat_interleave(group, dim=0)
        return out.transpose(0, 1).unsqueeze(0), None

    def mass(self) -> list[float]:
        """Per layer, the largest mean of its heads' attention to the first time of a repeat."""
        return [float(self._sums[i].max()) / self.places for i in sorted(self._sums)]
