"""LoLA without a part, for evaluation only: by weights that make it nothing, on every back end."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lola_vllm.evaluation import EvalError
from lola_vllm.models.schema import CLOSED_FACTOR

# What `without` of a setting may name.
HIDDEN_STATE, IMPORTANCE = "hidden-state", "importance"


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
            layer.window_factors.fill_(CLOSED_FACTOR)
        if IMPORTANCE in parts and layer.importance is not None:
            layer.importance.zero_()
        if hasattr(layer, "weights_changed"):
            layer.weights_changed()
