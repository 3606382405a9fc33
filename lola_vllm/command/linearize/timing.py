"""How fast this machine trains a base: a row of each kind, timed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lola_vllm.command.linearize.plan import Speed
from lola_vllm.command.linearize.recipe import Recipe, unlike, with_sizes
from lola_vllm.core.model_types import windows_of
from lola_vllm.training.distill.data import TrainingRows
from lola_vllm.training.distill.finetune import finetune
from lola_vllm.training.distill.student import attach_maps, load_base
from lola_vllm.training.distill.transfer import transfer

_LAYERS = 2  # that stand for all in stage 1, whose layers are alike


def measure_speed(base: Path, recipe: Recipe) -> Speed:
    """Train on a row of random tokens as each stage does, in a temporary directory.

    Raises:
        CheckpointError: a base that cannot be loaded.
    """
    device = _device()
    model = _model(base, recipe.train.dtype, device)
    layers = model.config.num_hidden_layers
    row = _row(model, recipe.train_on.lora_row_length).tokens
    with torch.no_grad():
        forward = _seconds(lambda: model.model(row.long().to(device))) / row.shape[1]
    mapped = _transfer_seconds(model, recipe)
    sizes = unlike(model.config.num_key_value_heads, layers, recipe.pairs)
    found = []
    for options in (recipe.train, with_sizes(recipe.train_on, sizes)):
        model = _model(base, recipe.train.dtype, device)
        rows = _row(model, recipe.train_on.lora_row_length)
        one = replace(options, rows_per_step=1, average=0.0)
        with tempfile.TemporaryDirectory() as work:
            spent = _seconds(
                lambda m=model, r=rows, o=one, w=work: finetune(  # type: ignore[misc]
                    m, [r], Path(w), o, fingerprint="-"
                )
            )
        found.append(spent / recipe.train_on.lora_row_length)
    return Speed(forward, mapped, *found)


def measure_transfer(base: Path, recipe: Recipe) -> float:
    """`Speed.transfer` alone, for another length of its rows.

    Raises:
        CheckpointError: a base that cannot be loaded.
    """
    return _transfer_seconds(_model(base, recipe.train.dtype, _device()), recipe)


def _transfer_seconds(model: Any, recipe: Recipe) -> float:
    """Of a token of a row of stage 1, in all layers."""
    options = recipe.train
    layers = windows_of(model.config).count(None)  # sliding ones have nothing to train
    row = _row(model, options.row_length).tokens
    with _first_layers(model), tempfile.TemporaryDirectory() as work:
        spent = _seconds(lambda: transfer(model, row, Path(work), options, fingerprint="-"))
    return spent / row.shape[1] * layers / min(_LAYERS, layers)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _model(base: Path, dtype: str, device: str) -> Any:
    model = load_base(base, getattr(torch, dtype)).to(device)
    attach_maps(model, model.config.num_key_value_heads)
    return model


def _row(model: Any, length: int) -> TrainingRows:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    return TrainingRows(tokens.int(), torch.zeros(1, length, dtype=torch.bool))


@contextmanager
def _first_layers(model: Any) -> Any:
    """Within this context the model has its first layers alone that do not slide."""
    layers = model.model.layers
    full = [layer for layer in layers if layer.self_attn.lola_window is None]
    model.model.layers = torch.nn.ModuleList(full[:_LAYERS])
    try:
        yield
    finally:
        model.model.layers = layers


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
