"""LoLA with another score than the self-recall error, or without a part, for evaluation only.

Servers use one score. This module gives the torch back end another one, in a process that is not a
server. The sparse cache then holds as many pairs, chosen by this score. Nothing else changes.

A part is left out by weights that make it nothing, on every back end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lola_vllm.core.ops import Backend, portable
from lola_vllm.evaluation import EvalError


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


# What `without` of a setting may name.
HIDDEN_STATE, IMPORTANCE = "hidden-state", "importance"
# A logit of the gate: exact pairs weigh e^60 times what the hidden state does, which is lost in
# rounding. It still has an exponential in float32.
_CLOSED = 60.0


def parts_of(without: str) -> list[str]:
    """The parts that a setting leaves out.

    Raises:
        EvalError: one that is none.
    """
    parts = [part.strip() for part in without.split(",") if part.strip()]
    for part in parts:
        if part not in (HIDDEN_STATE, IMPORTANCE):
            raise EvalError(
                f"without = {without!r}: {part!r} is no part; leave out {HIDDEN_STATE}, "
                f"{IMPORTANCE}, or both with a comma between"
            )
    return parts


@torch.no_grad()
def leave_out(model: nn.Module, without: str) -> None:
    """Let the layers of a loaded model, of vLLM or of transformers, answer without some parts.

    Without the hidden state, gates are 1: an answer is of the exact pairs alone, and which pairs
    they are does not change. Without importance, its weights are 0: the error alone chooses.

    Raises:
        EvalError: no such part, or a model whose mixing always counts the hidden state.
    """
    parts = parts_of(without)
    layers: list[Any] = [each for each in model.modules() if hasattr(each, "window_factors")]
    for layer in layers if parts else ():
        if HIDDEN_STATE in parts:
            if layer.lola.mixing != "lola":
                raise EvalError(
                    f"without = {without!r}: mixing = {layer.lola.mixing!r} counts the hidden "
                    "state whatever the gate is; leave this out for such models"
                )
            layer.window_factors.fill_(_CLOSED)
        if IMPORTANCE in parts and layer.importance is not None:
            layer.importance.zero_()
        if hasattr(layer, "weights_changed"):
            layer.weights_changed()


@dataclass
class CountedScore:
    """A score for the torch back end that counts the selections made by it.

    Attributes:
        score: of `SCORES`. selections: over all layers.
    """

    score: portable.Score
    selections: int = 0

    def __call__(self, v: Tensor, positions: Tensor) -> Tensor:
        """See `lola_vllm.core.ops.portable.Score`."""
        self.selections += 1
        return self.score(v, positions)


def use_score(model: nn.Module, score: portable.Score) -> None:
    """Let every LoLA layer of a loaded model keep the pairs of largest `score`.

    Raises:
        EvalError: a layer runs on another back end than torch.
    """
    from lola_vllm.engine.vllm.attention import LolaAttention

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
