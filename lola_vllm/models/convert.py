"""A LoLA checkpoint from a base and what LoLCATs training made for it (arXiv 2410.10254)."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lola_vllm.core.compact_json import compact_lists
from lola_vllm.core.config import DecoderConfig, TensorFacts
from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.models.base import (
    parse_config,
    read_base_config,
    with_context_shift,
    write_checkpoint,
)
from lola_vllm.models.files import (
    CheckpointError,
    read_json,
    read_shapes,
    weight_files,
)
from lola_vllm.models.lolcats import Lora, Maps, read_distill, read_lora
from lola_vllm.models.staging import check_output, staged_directory

if TYPE_CHECKING:
    from torch import Tensor

# Default of alpha / r, which LoRA files do not have: LoLCATs trained 16 / 8, and 8 / 4 for 405B.
LORA_SCALE = 2.0


def convert_checkpoint(
    base: Path,
    distill: Path,
    out: Path,
    config_overrides: Mapping[str, Any],
    lora: Path | None = None,
    *,
    lora_alpha: float | None = None,
    notes: str = "",
    force: bool = False,
) -> DecoderConfig:
    """Write a LoLA checkpoint: the base's weights, LoRA merged in, and LoLCATs' feature maps.

    `W' = W + (alpha / r) B A` is computed in float32 and cast to the dtype of W.
    `base.write_checkpoint` says how maps are written.

    Args:
        base: the directory of a decoder (`families.py`), sharded or not, embeddings tied or not.
        distill: LoLCATs' first stage, feature maps and window factors. Adapters may be in the
            same file; they are merged if so.
        out: where the checkpoint goes; it is written completely or not at all.
        config_overrides: keys of `lola_config` to set. `mixing` defaults to "lola",
            `context_shift` to a quarter of the base's trained length.
        lora: LoLCATs' second stage; feature maps in it replace those of `distill`. Default:
            `distill`, if that holds adapters.
        lora_alpha: default 2 r. r follows from the file.
        notes: Markdown for the end of the model card, for example how the maps were trained.
        force: replace a model that is already at `out`.

    Returns:
        The config that was written.

    Raises:
        CheckpointError: an input that is missing, damaged or of another model, or an `out` that
            may not be replaced.
        LolaConfigError: overrides that are not valid.
    """
    if lora_alpha is not None and not math.isfinite(lora_alpha):
        raise CheckpointError(f"lora_alpha = {lora_alpha}: must be a finite number")
    lola_config = {"mixing": "lola", **config_overrides}
    LolaConfig(**lola_config)
    inputs = [base, distill, *([lora] if lora else [])]
    check_output(out, force=force, inputs=inputs)  # before files are read

    raw = read_base_config(base)
    plain = parse_config(base, raw)
    lola_config = with_context_shift(plain, lola_config)
    maps = read_distill(distill, plain)
    lora = _lora_file(distill, maps, lora, lora_alpha)
    adapters = read_lora(lora, plain, maps, read_shapes(base)) if lora else Lora({}, {}, 0)
    alpha = LORA_SCALE * adapters.rank if lora_alpha is None else lora_alpha
    raw["lola_config"] = lola_config
    config = parse_config(base, raw)
    config.facts = TensorFacts(maps.feature_dim, maps.num_state_heads)
    trained = {**maps.tensors, **adapters.maps}

    def merged(name: str, weight: Tensor) -> Tensor:
        return _merged(name, weight, adapters, alpha)

    with staged_directory(out, force=force, inputs=inputs) as staging:
        write_checkpoint(base, staging, raw, config, trained, merged)
        options: dict[str, str] = {}
        if config_overrides:
            options["lola_config"] = json.dumps(dict(config_overrides))
        files = {"distill": distill}
        if lora:
            if lora != distill:
                files["lora"] = lora
            options["lora_alpha"] = f"{alpha:g}"
        card = _model_card(base, files, lola_config, options)
        card += f"\n{notes}" if notes else ""
        (staging / "README.md").write_text(card, encoding="utf-8")
    return config


def _lora_file(
    distill: Path, maps: Maps, lora: Path | None, lora_alpha: float | None
) -> Path | None:
    if lora is None:
        if maps.has_lora:
            return distill
        if lora_alpha is not None:
            raise CheckpointError(f"lora_alpha = {lora_alpha}: there is no LoRA file to scale")
    elif maps.has_lora and lora.resolve() != distill.resolve():
        raise CheckpointError(
            f"{distill}: holds LoRA adapters itself, and {lora} is given for them too; leave out "
            "--lora, or give a --distill without adapters"
        )
    return lora


def merge(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`W + scale * B A`, computed in float32 and cast to W's dtype.

    Args:
        weight: `[out, in]`. A: `[r, in]`. B: `[out, r]`. scale: alpha / r.
    """
    return (weight.float() + scale * (B.float() @ A.float())).to(weight.dtype)


def _merged(name: str, weight: Tensor, lora: Lora, alpha: float) -> Tensor:
    pair = lora.pairs.get(name)
    if pair is None:
        return weight
    weight = merge(weight, *pair, alpha / pair[0].shape[0])
    if not bool(weight.isfinite().all()):
        raise CheckpointError(f"{name}: not finite in {weight.dtype} after merging the LoRA")
    return weight


def _model_card(
    base: Path,
    files: Mapping[str, Path],
    lola_config: Mapping[str, Any],
    options: Mapping[str, Any],
) -> str:
    """`README.md`: what the checkpoint was made of and how. It has names of files, not paths.

    `files` are the other inputs by option name, `options` the options without paths.
    """
    import yaml

    name, licence = base.resolve().name, _licence(base)
    metadata = {**licence, "pipeline_tag": "text-generation", "tags": ["lola", "linear-attention"]}
    terms = licence.get("license_name") or licence.get("license")
    command = ["lola-vllm", "convert", "--base", name]
    for option, value in [*((role, path.name) for role, path in files.items()), *options.items()]:
        command += [f"--{option.replace('_', '-')}", str(value)]
    rows = [*(("base", path) for path in weight_files(base)), *files.items()]
    inputs = "\n".join(f"| {role} | `{path.name}` | `{_sha256(path)}` |" for role, path in rows)
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---

# {name} with LoLA attention

`{name}` with its softmax attention replaced by LoLA (arXiv 2505.23666), using feature maps trained
with LoLCATs (arXiv 2410.10254). vLLM needs the plugin `lola-vllm` to serve it.

Licence of the base: {terms or "not stated in its card or config; look it up before publishing"}.

## Made from

| input | file | sha256 |
|---|---|---|
{inputs}

    {shlex.join([*command, "--out", "DIR"])}

## lola_config

```json
{compact_lists(json.dumps(lola_config, indent=2))}
```
"""


def _licence(base: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` as the base's card or config states them."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    found: dict[str, Any] = read_json(base / "config.json")
    card = base / "README.md"
    if card.is_file():
        with suppress(ValueError, yaml.YAMLError):  # a bad card must not stop a conversion
            found = {**found, **(metadata_load(card) or {})}
    keys = ("license", "license_name", "license_link")
    return {key: found[key] for key in keys if isinstance(found.get(key), str)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
