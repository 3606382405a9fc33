"""Stage 1, attention transfer: train feature maps towards the output of softmax attention.

This is section 3.1 of LoLCATs (arXiv 2410.10254). It trains layer by layer. Every layer gets the
teacher's hidden states, so layers do not depend on each other's maps, and only one layer's
activations exist at a time. A file holds the hidden states between layers. Training computes what
serving computes, with sinks, window and the sparse cache that self-recall error chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops.differentiable import lola_attention_parallel
from lola_vllm.models import rope
from lola_vllm.models.files import CheckpointError
from lola_vllm.training.distill.options import DistillOptions
from lola_vllm.training.distill.state import read_state, write_state
from lola_vllm.training.distill.student import (
    all_maps,
    decoder_layers,
    layer_maps,
    load_maps,
    map_groups,
    output_projection,
    scale_rates,
)

STATE = "transfer"


def transfer(
    model: Any,
    rows: Tensor,
    work: Path,
    options: DistillOptions,
    *,
    fingerprint: str,
) -> list[list[float]]:
    """Train the maps of every layer in place.

    Args:
        model: from `load_base`, with maps attached.
        rows: `[N, T]` token ids, whole sequences.
        work: directory for hidden states (2 x N x T x hidden size in the model's dtype) and for
            the training state; an interrupted run continues after the last finished layer.
        options: of stage 1; each step draws one of their `configs`.
        fingerprint: of everything that the result depends on; a state of another run is refused.

    Returns:
        Per layer, the relative error of each step: ||(y - y*) W_o||^2 / ||y* W_o||^2. Sliding
        layers have no steps.

    Raises:
        CheckpointError: a training state that is of another run, or `work` cannot be written.
    """
    layers = decoder_layers(model)
    state = read_state(work, STATE, fingerprint)
    losses: list[list[float]] = state.meta["losses"] if state else []
    if state:
        load_maps(model, state.tensors)
    done = len(losses)
    total, initial = (n * len(rows) for n in (len(layers), done))
    with tqdm(total=total, initial=initial, unit="row", desc="attention transfer") as bar:
        for i in range(done, len(layers)):
            source = _hidden_path(work, i)
            if i == 0:
                _embed(model, rows, source)
            hidden = _hidden_file(model, rows, source, "r")
            target = _hidden_file(model, rows, _hidden_path(work, i + 1), "w+")
            losses.append(_train_layer(model, i, hidden, target, options, bar))
            target.flush()
            maps = all_maps(model)
            finished = {name: maps[name] for name in maps if int(name.split(".")[2]) <= i}
            write_state(work, STATE, fingerprint, finished, {"losses": losses})
            source.unlink()  # only now: a resumed run starts from here
    _hidden_path(work, len(layers)).unlink(missing_ok=True)
    return losses


def _train_layer(
    model: Any,
    index: int,
    hidden: np.ndarray[Any, Any],
    target: np.ndarray[Any, Any],
    options: DistillOptions,
    bar: tqdm[Any],
) -> list[float]:
    """Train one layer's maps, if it has any, and write the teacher's output, the next layer's
    input."""
    layer = decoder_layers(model)[index]
    maps, configs = layer_maps(layer), options.configs()
    attention = layer.self_attn
    weight = output_projection(attention)
    device, dtype = weight.device, weight.dtype
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + index)
    steps = options.steps_per_row if maps else 0
    total = len(hidden) * steps
    groups = map_groups([layer], options.learning_rate, options.window_factor_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for value in maps.values():
        value.requires_grad_(True)
    attention.capture = []
    losses: list[float] = []
    for row in torch.randperm(len(hidden), generator=generator).tolist():
        x = _from_file(hidden[row], dtype).to(device)[None]
        with torch.no_grad():
            position_ids = torch.arange(x.shape[1], device=device)[None]
            embeddings = rope.embeddings(attention, model.model.rotary_emb, x, position_ids)
            y = layer(x, position_embeddings=embeddings, position_ids=position_ids)
            y = y[0] if isinstance(y, tuple) else y
        target[row] = _to_file(y[0])
        for _ in range(steps):
            config = _draw(configs, generator).for_layer(index)
            chunks = _draw_chunks(x.shape[1], config, options.queries_per_step, generator)
            loss = _error(attention, config, chunks.to(device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(maps.values(), 1.0)
            scale_rates(optimizer, 0.5 * (1 + math.cos(math.pi * len(losses) / total)))
            optimizer.step()
            losses.append(loss.item())
        bar.update()
        if not losses:  # a sliding layer
            continue
        if not math.isfinite(losses[-1]):
            raise CheckpointError(
                f"layer {index}: the loss is {losses[-1]} after {len(losses)} steps; "
                "try a smaller learning rate"
            )
        bar.set_postfix(layer=index, loss=f"{losses[-1]:.4f}", refresh=False)
    attention.capture = None
    for value in maps.values():
        value.requires_grad_(False)
    return losses


def _error(attention: Any, config: LolaConfig, chunks: Tensor) -> Tensor:
    """Relative squared error of the layer's attention output on some chunks of the captured row.

    It is measured after the output projection, whose result the rest of the model gets.
    """
    q, k, v, teacher, sinks = attention.capture
    maps = (attention.feature_map_q, attention.feature_map_k, attention.window_factors)
    y = lola_attention_parallel(
        q.float(), k.float(), v.float(), *maps, config, chunks, attention.importance, sinks
    )
    C = config.update_interval
    positions = (chunks[:, None] * C + torch.arange(C, device=chunks.device)).flatten()
    real = positions < q.shape[1]
    positions = positions[real]
    wanted = teacher[:, positions].float()
    difference = (y[:, real] - wanted).flatten(2)
    weight = output_projection(attention).float()
    return (difference @ weight.T).square().mean() / (wanted.flatten(2) @ weight.T).square().mean()


def _draw(configs: Sequence[LolaConfig], generator: torch.Generator) -> LolaConfig:
    return configs[int(torch.randint(len(configs), (), generator=generator))]


def first_chunk_with_state(config: LolaConfig) -> int:
    """The first chunk of `update_interval` queries that sees a hidden state, counted from 0."""
    full = config.window_size + max(config.sizes) + config.sink_size
    return full // config.update_interval + 1


def check_row_length(
    option: str, length: int, configs: Sequence[LolaConfig], every_head: bool = True
) -> None:
    """Refuse rows in which nothing is folded, because no output depends on the maps then.

    Args:
        option: whose value `length` is, for the message.
        length: tokens of a row. configs: the settings to train for. every_head: whether the head
            with the largest cache must fold as well, or only the one with the smallest.

    Raises:
        CheckpointError: one of the settings folds nothing; names the least length that does.
    """
    for config in configs:
        size = max(config.sizes) if every_head else min(config.sizes)
        config = config.model_copy(update={"sparse_cache_size": size})
        least = first_chunk_with_state(config) * config.update_interval + 1
        if length < least:
            raise CheckpointError(
                f"{option} = {length}: with window {config.window_size}, sparse cache "
                f"{size} and {config.sink_size} sinks no pair of such a row "
                "is folded into the hidden state, and there is nothing to train; use rows of at "
                f"least {least} tokens, and several times as many to train well"
            )


def _draw_chunks(T: int, config: LolaConfig, queries: int, generator: torch.Generator) -> Tensor:
    """Chunks to train on, without the first ones, where nothing is folded yet."""
    C, U = config.update_interval, -(-T // config.update_interval)
    first = min(first_chunk_with_state(config), U - 1)
    count = max(1, min(queries // C, U - first))
    return first + torch.randperm(U - first, generator=generator)[:count]


def _hidden_path(work: Path, layer: int) -> Path:
    return work / f"hidden-{layer}.bin"


def _hidden_file(model: Any, rows: Tensor, path: Path, mode: Any) -> np.memmap[Any, Any]:
    """`[N, T, hidden size]`, bfloat16 as the bits of uint16."""
    dtype = np.uint16 if model.dtype == torch.bfloat16 else np.float32
    shape = (*rows.shape, model.config.hidden_size)
    try:
        return np.memmap(path, dtype=dtype, mode=mode, shape=shape)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot hold the hidden states: {error}") from error


@torch.no_grad()
def _embed(model: Any, rows: Tensor, path: Path) -> None:
    out = _hidden_file(model, rows, path, "w+")

    seen: list[Tensor] = []

    def keep(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = args or [kwargs["hidden_states"]]
        raise _Embedded

    # Some decoders scale embeddings: what the first layer gets is asked of the decoder itself.
    hook = decoder_layers(model)[0].register_forward_pre_hook(keep, with_kwargs=True)
    for i, row in enumerate(rows):
        with suppress(_Embedded):
            model.model(row.long().to(model.device)[None], use_cache=False)
        out[i] = _to_file(seen[0][0])
    hook.remove()
    out.flush()


class _Embedded(Exception):
    """The first layer's input is known: the layers are not needed."""


def _to_file(x: Tensor) -> np.ndarray[Any, Any]:
    x = x.cpu()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    return x.float().numpy()


def _from_file(x: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    if x.dtype == np.uint16:
        return torch.from_numpy(np.array(x).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(x)).to(dtype)
