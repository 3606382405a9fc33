"""`lola-vllm distill`: from a base model and texts to a LoLA checkpoint, resumable at any point."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lola_vllm.core.config import DecoderConfig
from lola_vllm.models.base import fingerprint_base
from lola_vllm.models.files import CheckpointError, open_weights
from lola_vllm.training.distill.options import FINETUNE, DistillOptions
from lola_vllm.training.distill.state import default_work, open_work, read_state, write_state

if TYPE_CHECKING:
    from torch import Tensor

    from lola_vllm.training.distill.data import TrainingRows

MAPS_NAME = "maps.safetensors"
LORA_NAME = "lora.safetensors"


def distill(
    base: Path,
    data: Sequence[str],
    out: Path,
    options: DistillOptions,
    *,
    start: Path | None = None,
    calibration: Path | None = None,
    work: Path | None = None,
    resume: bool = False,
    force: bool = False,
) -> DecoderConfig:
    """Train feature maps and adapters for a base model and write the LoLA checkpoint.

    Args:
        base: a local Hugging Face directory (Llama, Mistral, Qwen2 or Qwen3).
        data: files, directories or dataset names; see `training_rows`.
        out: where the checkpoint goes; it is written completely or not at all.
        start: a directory with `maps.safetensors` and `lora.safetensors` of an earlier run, such as
            its `work`. Stage 2 goes on from them, and stage 1 is left out.
        calibration: what `lola-vllm calibrate --save` wrote. Its sizes and its importance are
            trained for, and the checkpoint has them.
        work: keeps training states, `maps.safetensors`, `lora.safetensors` and
            `distill.json`; default: `out` with ".training" added.
        resume: continue the run in `work`; without it a `work` that holds a run is refused.
        force: replace a model that is already at `out`.

    Raises:
        CheckpointError: a base, data or directory that cannot be used; `out` stays untouched.
        LolaConfigError: a `lola_config` that is not valid.
    """
    import torch
    from transformers import AutoTokenizer

    from lola_vllm.models.calibration import load_calibration
    from lola_vllm.models.staging import check_output
    from lola_vllm.training.distill.average import RunningMean
    from lola_vllm.training.distill.data import RowOptions, training_rows
    from lola_vllm.training.distill.student import (
        all_maps,
        attach_maps,
        load_base,
        load_importance,
        load_maps,
    )
    from lola_vllm.training.distill.transfer import check_row_length, transfer

    importance: dict[str, Tensor] = {}
    if calibration is not None:
        sizes, importance = load_calibration(calibration)
        options = _with_sizes(options, sizes, calibration)
    configs = options.configs()  # refuses bad values before anything else happens
    if start is None:
        check_row_length("row_length", options.row_length, configs)
    elif not options.lora_rows:
        raise CheckpointError("lora_rows = 0: stage 2 is what goes on from an earlier run")
    if options.lora_rows:
        # Heads whose caches hold all of a row keep the maps that they begin with.
        every = start is None
        check_row_length("lora_row_length", options.lora_row_length, configs, every_head=every)
        lengths = options.lora_lengths()
        RunningMean(options.average, 1)  # refuses what is no share
        if not 0 <= options.lora_kept <= 1:
            raise CheckpointError(f"lora_kept = {options.lora_kept:g}: must be from 0 to 1")
    check_output(out, inputs=[base], force=force)
    earlier = _earlier(start) if start else None
    work = work or default_work(out)
    open_work(work, resume=resume)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_base(base, getattr(torch, options.dtype)).to(device)
    heads = {
        "kv": model.config.num_key_value_heads,
        "query": model.config.num_attention_heads,
    }.get(options.state_heads)
    if heads is None:
        raise CheckpointError(f"state_heads = {options.state_heads!r}: must be 'kv' or 'query'")
    for config in configs:
        config.check_layers(model.config.num_hidden_layers, model.config.num_key_value_heads)
    attach_maps(model, heads)
    load_importance(model, importance)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def rows(length: int, number: int, seed: int) -> TrainingRows:
        return training_rows(
            data,
            tokenizer,
            RowOptions(
                row_length=length,
                num_rows=number,
                seed=seed,
                retrieval_fraction=options.retrieval_fraction,
            ),
        )

    losses: dict[str, Any] = {}
    if earlier:
        begun = {**earlier.maps, **earlier.adapters, **importance}
        print_ = fingerprint(base, options, begun.values())
        if _saved(work / MAPS_NAME, print_) is None:
            _save(work / MAPS_NAME, _fitting(earlier.maps, all_maps(model)), print_)
    else:
        first = rows(options.row_length, options.rows, options.seed).tokens
        print_ = fingerprint(base, options, [first, *importance.values()])
        if _saved(work / MAPS_NAME, print_) is None:
            losses["transfer"] = transfer(model, first, work, options, fingerprint=print_)
            _save(work / MAPS_NAME, all_maps(model), print_)
    load_maps(model, _saved(work / MAPS_NAME, print_) or {})
    lora = None
    if options.lora_rows:
        # Other text in every part; seeds near each other are those of other runs.
        parts = [
            rows(length, count, options.seed + 1 + 1_000_003 * part)
            for part, (length, count) in enumerate(lengths)
        ]
        print_ = fingerprint(base, options, [part.tokens for part in parts], print_)
        lora = work / LORA_NAME
        if _saved(lora, print_) is None:
            from lola_vllm.training.distill.finetune import finetune

            tuned = finetune(
                model, parts, work, options,
                fingerprint=print_, start=earlier.adapters if earlier else None,
            )  # fmt: skip
            losses["finetune"] = tuned.losses
            _save(lora, {**tuned.adapters, **tuned.maps}, print_)
    _report(work, base, data, options, losses)
    return _write(base, work / MAPS_NAME, lora, out, options, importance, force)


class _Earlier(NamedTuple):
    """Of an earlier run: maps and window factors as it left them, and adapters."""

    maps: dict[str, Tensor]
    adapters: dict[str, Tensor]


def _earlier(folder: Path) -> _Earlier:
    found: dict[str, Tensor] = {}
    for name in (MAPS_NAME, LORA_NAME):  # maps of the second stage replace those of the first
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name}: no such file; to go on from an earlier run needs the "
                "--work-dir of one that had both stages"
            )
        with open_weights(folder / name) as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    adapters = {key for key in found if ".lora_" in key}
    return _Earlier(
        {key: value for key, value in found.items() if key not in adapters},
        {key: found[key] for key in adapters},
    )


def _fitting(maps: dict[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`maps`, if they are of the model whose maps are `like`."""
    shapes, wanted = ({n: list(x.shape) for n, x in m.items()} for m in (maps, like))
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            raise CheckpointError(
                f"maps to begin with: {name!r} is {shapes.get(name)} and must be "
                f"{wanted.get(name)}; give their own base and state_heads"
            )
    return maps


def _with_sizes(options: DistillOptions, sizes: Mapping[str, Any], path: Path) -> DistillOptions:
    if options.lola_config.keys() & sizes.keys() or options.train_sparse_caches:
        raise CheckpointError(
            f"{path}: holds the sizes of the sparse caches; leave out {', '.join(sizes)} and "
            "train_sparse_caches"
        )
    return replace(options, lola_config={**options.lola_config, **sizes})


def _write(
    base: Path,
    maps: Path,
    lora: Path | None,
    out: Path,
    options: DistillOptions,
    importance: Mapping[str, Tensor],
    force: bool,
) -> DecoderConfig:
    from lola_vllm.core.lola_config import HEAD_KEYS
    from lola_vllm.models.calibration import apply_calibration
    from lola_vllm.models.convert import convert_checkpoint
    from lola_vllm.models.staging import staged_directory

    keys = dict(options.lola_config)
    calibrated = {key: keys.pop(key) for key in HEAD_KEYS if importance and key in keys}
    with staged_directory(out, force=force, inputs=[base]) as staging:
        config = convert_checkpoint(
            base, maps, staging, keys, lora, lora_alpha=options.lora_alpha if lora else None
        )
        return apply_calibration(staging, calibrated, importance) if importance else config


def fingerprint(
    base: Path, options: DistillOptions, tensors: Iterable[Tensor], before: str = ""
) -> str:
    """Hash of all that a stage's result depends on: model, options, tokens and what else it begins
    with, and the stage before."""
    import torch

    digest = hashlib.sha256(before.encode())
    digest.update(fingerprint_base(base))
    chosen = asdict(options)
    if not before:  # the second stage's options do not change the first
        chosen = {key: value for key, value in chosen.items() if key not in FINETUNE}
    digest.update(json.dumps(chosen, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _saved(path: Path, print_: str) -> dict[str, Tensor] | None:
    state = read_state(path.parent, path.stem, print_)
    return state.tensors if state else None


def _save(path: Path, tensors: dict[str, Tensor], print_: str) -> None:
    import torch

    narrow = {
        name: value.to(torch.float32 if name.endswith("window_factors") else torch.bfloat16)
        for name, value in tensors.items()
    }
    write_state(path.parent, path.stem, print_, narrow, {})


def _report(
    work: Path,
    base: Path,
    data: Sequence[str],
    options: DistillOptions,
    losses: Mapping[str, Any],
) -> None:
    path = work / "distill.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    report: dict[str, Any] = {
        "base": base.resolve().name,
        "data": [Path(name).name for name in data],
        "options": asdict(options),
        "losses": {**found.get("losses", {}), **losses},
    }
    path.write_text(json.dumps(report, indent=1))
