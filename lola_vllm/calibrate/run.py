"""`lola-vllm calibrate`: how many sparse pairs each KV head should have, and which it should keep.

A model reads back what it has read before in a few of its heads. The others need few exact pairs.
Calibration measures this on plain text with softmax attention. Where a text repeats an n-gram, the
model can know its last token from the first time. The attention that a head's queries give to that
place is how much the head reads back.

A head of mass m with n pairs is taken to lose m / n. Under a fixed sum of pairs the sum of the
losses is least where n grows as the square root of m. With one size for all heads of a layer, the
mass of its strongest head counts.

A second reading fits saliency (`saliency.py`), which says which pairs these caches should hold.
Plain text seldom asks for a detail from far back, so most of its prompts hide facts and ask for
them (`prompts.py`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lola_vllm.calibrate.options import CalibrateOptions
from lola_vllm.calibrate.prompts import documents_of, draw_prompts
from lola_vllm.calibrate.reader import ATTENTION, Repeats, attention, read
from lola_vllm.calibrate.saliency import (
    JUDGED_ONE_IN,
    LAST_TOKENS,
    SKIPPED_TOKENS,
    Asked,
    Read,
    fit,
    held,
    parted,
)
from lola_vllm.checkpoint.base import read_base_config
from lola_vllm.checkpoint.files import CheckpointError, open_weights, weight_files


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        mass: per layer and KV head, the mean attention of its strongest query head to the first
            time.
        places: where the texts repeat themselves.
        sizes: per layer, its pairs, or those of its KV heads: a `lola_config.sparse_cache_size`.
        saliency: per layer `[Hkv, d // 2 + d + 1]`, its tensor `saliency`.
        held: per layer, the share of what is read from afar that its caches would hold, with the
            error alone and with saliency, in prompts that the fit did not see.
    """

    mass: list[list[float]]
    places: int
    sizes: list[int] | list[list[int]]
    saliency: list[Tensor]
    held: list[tuple[float, float]]


def calibrate(
    base: Path, texts: Path, options: CalibrateOptions, model: Path | None = None
) -> Calibration:
    """Read text with softmax attention, divide the pairs, and fit saliency.

    Args:
        base: a local directory of the softmax model.
        texts: a file or a directory of files. Held-out documents are not read, so that they stay
            for measuring.
        model: a LoLA model made of `base`. Saliency is fitted to its keys, values and maps. Without
            it, to the base's with identity maps. Its linear layers must not be quantized.

    Raises:
        CheckpointError: a model or options that cannot be used, or texts that are too short or
            never repeat themselves.
        TextsError: files that cannot be read.
    """
    if options.pairs < options.least or options.least < 0:
        raise CheckpointError(
            f"--pairs = {options.pairs}: must be at least --least = {options.least}, and that 0"
        )
    if not 0 <= options.facts <= 1:
        raise CheckpointError(f"--facts = {options.facts:g}: must be between 0 and 1")
    if options.prompts < JUDGED_ONE_IN:
        raise CheckpointError(f"--prompts = {options.prompts}: must be at least {JUDGED_ONE_IN}")
    import transformers

    read_base_config(base)  # refuses families that could not be served
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    documents = documents_of(texts)
    windows = _windows(documents, tokenizer, options)
    transformers.AttentionInterface.register(ATTENTION, attention)
    softmax = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation=ATTENTION
    ).eval()
    repeats = Repeats()
    read(softmax, windows, repeats)
    if not repeats.places:
        raise CheckpointError(
            f"--texts {texts}: no window of {options.window_length} tokens repeats anything; use "
            "longer windows or more text"
        )
    mass = repeats.mass()
    sizes = divide_among(mass, options)
    maps = _identity_maps(softmax.config) if model is None else _load_weights(softmax, model)
    prompts = draw_prompts(texts, documents, tokenizer, options)
    if min(len(prompt.ids) for prompt in prompts) <= SKIPPED_TOKENS + LAST_TOKENS:
        raise CheckpointError(
            f"--prompt-length = {options.prompt_length}: too short for anything to leave the "
            "window; use prompts of 300 tokens or more"
        )
    asked = Asked(prompts, maps)
    read(softmax, [prompt.ids for prompt in prompts], asked)
    saliency, shares = [], []
    for layer, reads in enumerate(asked.reads):
        of_heads = _of_heads(sizes[layer], len(mass[layer]))
        fitted, judged = parted(reads)
        saliency.append(fit(fitted, of_heads, options.seed))
        shares.append((_share(judged, of_heads, None), _share(judged, of_heads, saliency[-1])))
    return Calibration(mass, repeats.places, sizes, saliency, shares)


def _of_heads(sizes: int | list[int], heads: int) -> list[int]:
    return [sizes] * heads if isinstance(sizes, int) else sizes


def _share(reads: Sequence[Read], sizes: Sequence[int], weights: Tensor | None) -> float:
    kept, all_of_it = held(reads, sizes, weights)
    return float(kept.sum() / all_of_it.sum().clamp(min=1e-9))


def _identity_maps(config: Any) -> list[Tensor]:
    """A layer's key maps as `lola-vllm init` makes them."""
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [torch.eye(d).repeat(config.num_key_value_heads, 1, 1)] * config.num_hidden_layers


def _load_weights(softmax: Any, model: Path) -> list[Tensor]:
    """Give a softmax model the weights of a LoLA model; the key maps of its layers, in float32.

    Raises:
        CheckpointError: a model of other weights, or one whose linear layers are quantized.
    """
    own = dict(softmax.named_parameters())
    missing, maps = set(own), dict[int, Tensor]()
    for path in weight_files(model):
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(".feature_map_k"):
                    maps[int(name.split(".")[2])] = file.get_tensor(name).float()
            for name in missing & set(file.keys()):
                tensor = file.get_tensor(name)
                if tensor.shape != own[name].shape or not tensor.is_floating_point():
                    raise CheckpointError(
                        f"{model}: {name!r} is {tensor.dtype} {list(tensor.shape)}, the base's "
                        f"{list(own[name].shape)}; calibrate the model before it is quantized"
                    )
                own[name].data.copy_(tensor)
                missing.discard(name)
    if missing:
        raise CheckpointError(f"{model}: no tensor {min(missing)!r}; was it made of this base?")
    if len(maps) != softmax.config.num_hidden_layers:
        raise CheckpointError(
            f"{model}: maps of {len(maps)} layers, and {softmax.config.num_hidden_layers} layers"
        )
    return [maps[layer] for layer in sorted(maps)]


def _windows(
    documents: Mapping[str, list[str]], tokenizer: Any, options: CalibrateOptions
) -> list[list[int]]:
    """Windows of documents that fill one, taken in turns from every file."""
    length = options.window_length
    found: list[list[list[int]]] = []  # by file
    each = -(-options.windows // max(1, len(documents)))
    for name, of_file in documents.items():
        shuffled = [*of_file]
        random.Random(f"{options.seed}/{name}").shuffle(shuffled)
        found.append([])
        for text in shuffled:
            if len(found[-1]) == each:
                break
            # A token has two characters or more on average, so this is enough of a long text.
            ids = tokenizer.encode(text[: 16 * length], add_special_tokens=False)[:length]
            if len(ids) == length:
                found[-1].append(ids)
    turns = [windows[i] for i in range(each) for windows in found if i < len(windows)]
    return turns[: options.windows]


def divide_among(
    mass: Sequence[Sequence[float]], options: CalibrateOptions
) -> list[int] | list[list[int]]:
    """Sizes by layer, or by layer and KV head, from the mass of each."""
    if options.by == "layer":
        layers = [max(heads) for heads in mass]
        return divide(layers, options.pairs * len(layers), options.least)
    flat = [value for heads in mass for value in heads]
    sizes = iter(divide(flat, options.pairs * len(flat), options.least))
    return [[next(sizes) for _ in heads] for heads in mass]


def divide(mass: Sequence[float], total: int, least: int) -> list[int]:
    """Pairs of each mass that sum to `total`: `least`, and the rest by the root of the mass.

    Raises:
        ValueError: `total` is less than `least` for each, or nothing has mass.
    """
    spare = total - least * len(mass)
    roots = [value**0.5 for value in mass]
    if spare < 0 or sum(roots) <= 0:
        raise ValueError(f"{total} pairs for {len(mass)} sets of {least} or more, mass {mass}")
    exact = [spare * root / sum(roots) for root in roots]
    sizes = [least + int(share) for share in exact]
    # What rounding left goes to those that lost most by it.
    order = sorted(range(len(mass)), key=lambda i: int(exact[i]) - exact[i])
    for i in order[: total - sum(sizes)]:
        sizes[i] += 1
    return sizes


def report(found: Calibration) -> str:
    """By layer, what its caches hold of what is read from afar, with the error alone and with
    saliency, and each head's mass and pairs; the sizes as JSON."""
    lines = [f"{found.places} places where the text repeats what it said far back", ""]
    lines.append("layer  held by error, with saliency  reads back and pairs, of each KV head")
    for layer, mass in enumerate(found.mass):
        (alone, weighed), sizes = found.held[layer], found.sizes[layer]
        pairs = _of_heads(sizes, len(mass))
        heads = (f"{m:7.1%} {n:5}" for m, n in zip(mass, pairs, strict=True))
        lines.append(f"{layer:5}  {alone:13.0%}  {weighed:13.0%}  {'  '.join(heads)}")
    return "\n".join([*lines, "", json.dumps({"sparse_cache_size": found.sizes})])
