"""LoLA with another score than the self-recall error, for evaluation only.

Servers use one score. This module gives the torch back end another one, in a process that is not a
server. The sparse cache then holds as many pairs, chosen by this score. Nothing else changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lola_vllm.eval import EvalError
from lola_vllm.ops import Backend, portable


def newest(v: Tensor, positions: Tensor) -> Tensor:
    """The position: the cache holds the pairs that left the window last, a longer window."""
    return positions.float()


def random(v: Tensor, positions: Tensor) -> Tensor:
    """A number in [0, 1) that position and head alone decide: a uniform sample of all pairs.

    A pair has the same number at every update. With new numbers, each update would lose old pairs
    that an earlier one had kept.
    """
    head = torch.arange(positions.shape[1], device=positions.device)[None, :, None]
    mixed = (positions.long() + 1) * 2654435761 + (head + 1) * 40503 * 65537
    for shift in (16, 13, 15):  # shifts and products, so that neighbours get unrelated numbers
        mixed = ((mixed ^ (mixed >> shift)) * 73244475) & 0xFFFFFFFF
    return mixed.float() / 2**32


def norm(v: Tensor, positions: Tensor) -> Tensor:
    """The length of the value, which is the self-recall error of an empty state."""
    return v.float().norm(dim=-1)


SCORES: dict[str, portable.Score] = {"random": random, "newest": newest, "norm": norm}


@dataclass
class CountedScore:
    """A score for the torch back end that counts the selections made by it.

    Attributes:
        score: of `SCORES`. selections: over all layers.
    """

    score: portable.Score
    selections: int = 0

    def __call__(self, v: Tensor, positions: Tensor) -> Tensor:
        """See `lola_vllm.ops.portable.Score`."""
        self.selections += 1
        return self.score(v, positions)


def use_score(model: nn.Module, score: portable.Score) -> None:
    """Let every LoLA layer of a loaded model keep the pairs of largest `score`.

    Raises:
        EvalError: a layer runs on another back end than torch.
    """
    from lola_vllm.plugin.attention import LolaAttention

    for layer in model.modules():
        if isinstance(layer, LolaAttention):
            layer.ops = with_score(layer.ops, score)


def with_score(ops: Backend, score: portable.Score) -> Backend:
    """The torch back end with another score.

    Raises:
        EvalError: `ops` is another back end.
    """
    if ops.name != "torch":
        raise EvalError(
            f"--score: the back end {ops.name} knows no other score than sre; set "
            "LOLA_VLLM_OPS=torch"
        )
    return replace(
        ops,
        decode=partial(portable.decode, score=score),
        prefill=partial(portable.prefill, score=score),
    )
