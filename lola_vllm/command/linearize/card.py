"""How a model was made, for the end of its card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lola_vllm.command.linearize.plan import STAGES
from lola_vllm.command.linearize.recipe import Recipe
from lola_vllm.training.texts import MANIFEST

TITLE = "## How it was made"


def card_notes(
    recipe: Recipe,
    texts: Path,
    tokens: Mapping[str, int],
    seconds: Mapping[str, float],
    held: str,
    tables: Sequence[str],
) -> str:
    """Markdown: stages, text with its licences, results, and the recipe.

    Args:
        texts: a directory or a file. tokens, seconds: by stage.
        held: what the calibration says of itself. tables: of the evaluation, in Markdown.
    """
    rows = "\n".join(
        f"| {title} | {tokens[name]:,} | {seconds.get(name, 0.0) / 3600:.2f} |"
        for name, title in STAGES.items()
        if name in tokens
    )
    measured = "\n\n".join(tables) or "Nothing was measured: the recipe leaves it out."
    return f"""{TITLE}

`lola-vllm linearize` trained feature maps, window factors and LoRA adapters (rank
{recipe.train.lora_rank}, on q, k, v and o). The teacher is the base itself, so nothing of another
model is in them.

| stage | tokens | hours |
|---|---|---|
{rows}

{held}

**Text.** {_sources(texts)} About one document in twenty, chosen by hash, was never trained on.

## Measured

On text that was not trained on. The questions may have been asked while the recipe was made.
"reference" is the base.

{measured}

## Recipe

    {json.dumps(asdict(recipe))}
"""


def _sources(texts: Path) -> str:
    """The names and the licences of texts, as far as they say them."""
    manifest = texts / MANIFEST
    if not manifest.is_file():
        return f"{texts.name}."
    found = json.loads(manifest.read_text(encoding="utf-8"))
    return "; ".join(f"{entry['name']} ({entry['licence']})" for entry in found) + "."
