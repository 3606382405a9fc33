"""`lola-vllm calibrate`: how many sparse pairs each layer of a model should have.

A model reads back what it has read before in a few of its layers. The others need few exact pairs.
Calibration measures this on plain text with the softmax base model. Where a text repeats an n-gram,
the model can know its last token from the first time. The attention that a layer's heads give to
that place is how much the layer reads back.

A layer of mass m with n pairs is taken to lose m / n. Under a fixed sum of pairs the sum of the
losses is least where n grows as the square root of m.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lola_vllm.calibrate.options import CalibrateOptions
from lola_vllm.checkpoint.base import read_base_config
from lola_vllm.checkpoint.files import CheckpointError, read_json, write_json
from lola_vllm.config import MODEL_TYPE, LolaLlamaConfig
from lola_vllm.distill.student import softmax_attention
from lola_vllm.eval.repeats import repeated_ngrams
from lola_vllm.texts import is_held_out, read_documents

ATTENTION = "lola_calibration"


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        mass: per layer, the mean attention of its strongest head to the first time.
        places: where the texts repeat themselves.
        sizes: per layer, its pairs: a `lola_config.sparse_cache_size`.
    """

    mass: list[float]
    places: int
    sizes: list[int]


def calibrate(base: Path, texts: Path, options: CalibrateOptions) -> Calibration:
    """Measure a base model and divide the pairs.

    Args:
        base: a local directory of the softmax model.
        texts: a file or a directory of files. Held-out documents are not read, so that they stay
            for measuring.

    Raises:
        CheckpointError: a model or options that cannot be used, or texts that are too short or
            never repeat themselves.
        TextsError: files that cannot be read.
    """
    if options.pairs < options.least or options.least < 0:
        raise CheckpointError(
            f"--pairs = {options.pairs}: must be at least --least = {options.least}, and that 0"
        )
    import transformers

    read_base_config(base)  # refuses families that could not be served
    reader = _Reader()
    transformers.AttentionInterface.register(ATTENTION, reader.attention)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation=ATTENTION
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for ids in _windows(texts, tokenizer, options):
        reader.read(model, ids)
    if not reader.places:
        raise CheckpointError(
            f"--texts {texts}: no window of {options.window_length} tokens repeats anything; use "
            "longer windows or more text"
        )
    mass = reader.mass()
    total = options.pairs * len(mass)
    return Calibration(mass, reader.places, divide(mass, total, options.least))


class _Reader:
    """Reads windows and adds up what each head attends to at repeats."""

    def __init__(self) -> None:
        self.places = 0
        self._sums: dict[int, Tensor] = {}  # layer -> [Hq]
        self._queries = self._keys = torch.zeros(0, dtype=torch.long)

    @torch.no_grad()
    def read(self, model: Any, ids: list[int]) -> None:
        """Read one window."""
        places = repeated_ngrams(ids)
        if not places:
            return
        self.places += len(places)
        # The token before the last one of the n-gram asks; the last one of the first time answers.
        self._queries = torch.tensor([end - 1 for end, _ in places])
        self._keys = torch.tensor([before for _, before in places])
        model.model(torch.tensor([ids]), use_cache=False)

    def attention(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        """Softmax attention, `[1, H, T, d]` in and `[1, T, Hq, d]` out, that takes notes."""
        keys = k[0].repeat_interleave(q.shape[1] // k.shape[1], dim=0)  # [Hq, T, d]
        logits = q[0][:, self._queries] @ keys.mT * q.shape[-1] ** -0.5  # [Hq, P, T]
        later = torch.arange(k.shape[2]) > self._queries[:, None]
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)
        found = weights[:, torch.arange(len(self._keys)), self._keys].sum(-1)
        self._sums[module.layer_idx] = self._sums.get(module.layer_idx, 0) + found
        return softmax_attention(q, k, v).transpose(1, 2), None

    def mass(self) -> list[float]:
        """Per layer, the largest mean of its heads."""
        return [float(self._sums[i].max()) / self.places for i in sorted(self._sums)]


def _windows(texts: Path, tokenizer: Any, options: CalibrateOptions) -> list[list[int]]:
    """Windows of documents that fill one, taken in turns from every file."""
    files = sorted(texts.glob("*.txt")) if texts.is_dir() else [texts]
    length = options.window_length
    windows: list[list[int]] = []
    each = -(-options.windows // max(1, len(files)))
    for file in files:
        documents = [text for text in read_documents(file) if not is_held_out(text)]
        random.Random(f"{options.seed}/{file.name}").shuffle(documents)
        found = 0
        for text in documents:
            if found == each:
                break
            # A token has two characters or more on average, so this is enough of a long text.
            ids = tokenizer.encode(text[: 16 * length], add_special_tokens=False)[:length]
            if len(ids) == length:
                windows.append(ids)
                found += 1
    return windows[: options.windows]


def divide(mass: Sequence[float], total: int, least: int) -> list[int]:
    """Pairs per layer that sum to `total`: `least`, and the rest by the root of the mass.

    Raises:
        ValueError: `total` is less than `least` for each layer, or no layer has mass.
    """
    spare = total - least * len(mass)
    roots = [value**0.5 for value in mass]
    if spare < 0 or sum(roots) <= 0:
        raise ValueError(f"{total} pairs for {len(mass)} layers of {least} or more, mass {mass}")
    exact = [spare * root / sum(roots) for root in roots]
    sizes = [least + int(share) for share in exact]
    # What rounding left goes to the layers that lost most by it.
    order = sorted(range(len(mass)), key=lambda i: int(exact[i]) - exact[i])
    for i in order[: total - sum(sizes)]:
        sizes[i] += 1
    return sizes


def write_sizes(model: Path, sizes: list[int]) -> None:
    """Put the sizes into the `config.json` of a LoLA model.

    Raises:
        CheckpointError: it is no LoLA model. LolaConfigError: another number of layers.
    """
    path = model / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{path}: model_type {raw.get('model_type')!r} is no LoLA model")
    raw["lola_config"] = {**raw.get("lola_config", {}), "sparse_cache_size": sizes}
    config = LolaLlamaConfig(**raw)
    config.lola.check_layers(config.num_hidden_layers)
    write_json(path, raw)


def report(found: Calibration) -> str:
    """Mass and pairs by layer, and the `lola_config`."""
    lines = [f"{found.places} places where the text repeats what it said far back", ""]
    lines.append("layer  reads back  pairs")
    for layer, (mass, size) in enumerate(zip(found.mass, found.sizes, strict=True)):
        lines.append(f"{layer:5}  {mass:10.1%}  {size:5}")
    settings = json.dumps({"lola_config": {"sparse_cache_size": found.sizes}})
    return "\n".join([*lines, "", f"--hf-overrides '{settings}'"])
