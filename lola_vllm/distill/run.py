"""`lola-vllm distill`: from a base model and texts to a LoLA checkpoint, resumable at any point."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lola_vllm.checkpoint.files import CheckpointError
from lola_vllm.config import LolaLlamaConfig
from lola_vllm.distill.options import FINETUNE, DistillOptions

if TYPE_CHECKING:
    from torch import Tensor

MAPS_NAME = "maps.safetensors"
LORA_NAME = "lora.safetensors"


def distill(
    base: Path,
    data: Sequence[str],
    out: Path,
    options: DistillOptions,
    *,
    work: Path | None = None,
    resume: bool = False,
    force: bool = False,
) -> LolaLlamaConfig:
    """Train feature maps and adapters for a base model and write the LoLA checkpoint.

    Args:
        base: a local Hugging Face directory (Llama, Mistral, Qwen2 or Qwen3).
        data: files, directories or dataset names; see `training_rows`.
        out: where the checkpoint goes; it is written completely or not at all.
        work: keeps training states, `maps.safetensors`, `lora.safetensors`, loss curves and
            `distill.json`; default: `out` with ".training" added.
        resume: continue the run in `work`; without it a `work` that holds a run is refused.
        force: replace a model that is already at `out`.

    Raises:
        CheckpointError: a base, data or directory that cannot be used; `out` stays untouched.
        LolaConfigError: a `lola_config` that is not valid.
    """
    import torch
    from transformers import AutoTokenizer

    from lola_vllm.checkpoint.convert import convert_checkpoint
    from lola_vllm.checkpoint.staging import check_output
    from lola_vllm.distill.data import RowOptions, training_rows
    from lola_vllm.distill.student import all_maps, attach_maps, load_base, load_maps
    from lola_vllm.distill.transfer import check_row_length, transfer

    configs = options.configs()  # refuses bad values before anything else happens
    check_row_length("row_length", options.row_length, configs)
    if options.lora_rows:
        check_row_length("lora_row_length", options.lora_row_length, configs)
    check_output(out, inputs=[base], force=force)
    work = _work_directory(work or out.with_name(out.name + ".training"), resume)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_base(base, _dtype(options.dtype)).to(device)
    heads = {
        "kv": model.config.num_key_value_heads,
        "query": model.config.num_attention_heads,
    }.get(options.state_heads)
    if heads is None:
        raise CheckpointError(f"state_heads = {options.state_heads!r}: must be 'kv' or 'query'")
    attach_maps(model, heads)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def rows(length: int, number: int, seed: int) -> Any:
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
    first = rows(options.row_length, options.rows, options.seed)
    print_ = fingerprint(base, options, first.tokens)
    maps = _saved(work / MAPS_NAME, print_)
    if maps is None:
        losses["transfer"] = transfer(model, first.tokens, work, options, fingerprint=print_)
        maps = all_maps(model)
        _save(work / MAPS_NAME, maps, print_)
    load_maps(model, maps)
    lora = None
    if options.lora_rows:
        second = rows(options.lora_row_length, options.lora_rows, options.seed + 1)
        print_ = fingerprint(base, options, second.tokens, print_)
        lora = work / LORA_NAME
        if _saved(lora, print_) is None:
            from lola_vllm.distill.finetune import finetune

            tuned = finetune(
                model, second.tokens, second.answers, work, options, fingerprint=print_
            )
            losses["finetune"] = tuned.losses
            _save(lora, {**tuned.adapters, **tuned.maps}, print_)
    _report(work, base, data, options, losses)
    return convert_checkpoint(
        base,
        work / MAPS_NAME,
        out,
        options.lola_config,
        lora,
        lora_alpha=options.lora_alpha if lora else None,
        force=force,
    )


def fingerprint(base: Path, options: DistillOptions, rows: Tensor, before: str = "") -> str:
    """Hash of all that a stage's result depends on: model, options, tokens, the stage before."""
    digest = hashlib.sha256(before.encode())
    digest.update((base / "config.json").read_bytes())
    for path in sorted(base.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    chosen = asdict(options)
    if not before:  # the second stage's options do not change the first
        for item in fields(options):
            if item.metadata.get("part") == FINETUNE:
                del chosen[item.name]
    digest.update(json.dumps(chosen, sort_keys=True).encode())
    digest.update(rows.cpu().numpy().tobytes())
    return digest.hexdigest()


def _dtype(name: str) -> Any:
    import torch

    if name not in ("float32", "bfloat16"):
        raise CheckpointError(f"dtype = {name!r}: must be float32 or bfloat16")
    return getattr(torch, name)


def _work_directory(work: Path, resume: bool) -> Path:
    if not resume and work.is_dir() and any(work.iterdir()):
        raise CheckpointError(
            f"{work}: holds an earlier run; go on with it by --resume, or name another --work-dir"
        )
    work.mkdir(parents=True, exist_ok=True)
    return work


def _saved(path: Path, print_: str) -> dict[str, Tensor] | None:
    from lola_vllm.distill.state import read_state

    state = read_state(path.parent, path.stem, print_)
    return state.tensors if state else None


def _save(path: Path, tensors: dict[str, Tensor], print_: str) -> None:
    import torch

    from lola_vllm.distill.state import write_state

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
    """`distill.json` and the loss curves; a resumed run adds to what is there."""
    from lola_vllm.distill.plot import plot_losses

    path = work / "distill.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    report: dict[str, Any] = {
        "base": base.resolve().name,
        "data": [Path(name).name for name in data],
        "options": asdict(options),
        "losses": {**found.get("losses", {}), **losses},
    }
    path.write_text(json.dumps(report, indent=1))
    plot_losses(report["losses"], work / "loss.png")
