"""What LoLA would be with another score than the self-recall error: for evaluation only.

Serving knows one score. Here, in a process that serves nobody, the score of the torch back end is
exchanged, so that the sparse cache holds as many pairs, chosen otherwise. All else stays as it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from lola_vllm.eval import EvalError
from lola_vllm.ops import torch as portable

# From values [B, Hg, E, d], positions [B, Hg, E] and heads Hg to scores [B, Hg, E].
Score = Callable[[Tensor, Tensor], Tensor]


def newest(v: Tensor, positions: Tensor) -> Tensor:
    """The position: the cache holds the pairs that left the window last, a longer window."""
    return positions.float()


def random(v: Tensor, positions: Tensor) -> Tensor:
    """A number in [0, 1) that position and head alone decide: a uniform sample of all pairs.

    Nothing is drawn anew, or each update would lose old pairs that an earlier one had kept.
    """
    head = torch.arange(positions.shape[1], device=positions.device)[None, :, None]
    mixed = (positions.long() + 1) * 2654435761 + (head + 1) * 40503 * 65537
    for shift in (16, 13, 15):  # an avalanche of shifts and products: neighbours look unrelated
        mixed = ((mixed ^ (mixed >> shift)) * 73244475) & 0xFFFFFFFF
    return mixed.float() / 2**32


def norm(v: Tensor, positions: Tensor) -> Tensor:
    """The length of the value, which is the self-recall error of an empty state."""
    return v.float().norm(dim=-1)


SCORES: dict[str, Score] = {"newest": newest, "random": random, "norm": norm}


@contextlib.contextmanager
def score_by(name: str) -> Iterator[list[int]]:
    """Within, the torch back end of this process keeps pairs by another score.

    Args:
        name: "sre" changes nothing; else a key of `SCORES`.

    Yields:
        A list that grows by the candidates of every selection made by the exchanged score.

    Raises:
        EvalError: an unknown name, or another back end than torch would serve.
    """
    calls: list[int] = []
    if name == "sre":
        yield calls
        return
    if name not in SCORES:
        raise EvalError(f"score = {name!r}: must be sre, {', '.join(SCORES)}")
    if os.environ.get("LOLA_VLLM_OPS") != "torch":
        raise EvalError(f"score = {name!r}: only the torch back end can; set LOLA_VLLM_OPS=torch")
    score, largest = SCORES[name], portable._largest
    values: list[Tensor] = []

    def keep_values(k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        values[:] = [v]  # selection follows at once, with the positions
        return torch.zeros(v.shape[:-1], device=v.device)

    def select(scores: Tensor, positions: Tensor, ok: Tensor, lam: int) -> Tensor:
        calls.append(positions.shape[-1])
        return largest(score(values.pop(), positions), positions, ok, lam)

    with (
        mock.patch.object(portable, "sre_scores", keep_values),
        mock.patch.object(portable, "_largest", select),
    ):
        yield calls
