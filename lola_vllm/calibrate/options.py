"""The options of `lola-vllm calibrate`, without anything heavy to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lola_vllm.cli_options import option


@dataclass(frozen=True)
class CalibrateOptions:
    """What is read, and how many pairs there are to give."""

    pairs: int = option("of a KV head, on average", 128)
    least: int = option("pairs of any KV head", 16)
    by: Literal["head", "layer"] = option(
        "a size for each KV head, or one for all heads of a layer", "head"
    )
    windows: int = option("of text to read", 64)
    window_length: int = option("in tokens", 1024)
    facts: float = option(
        "share of the windows for saliency that hide facts in text and ask for them at the end", 0.5
    )
    strength: float = option(
        "power to which saliency weighs the recall error: more finds more in prose and less in "
        "text that repeats itself",
        0.2,
    )
    seed: int = option("of the choice of windows", 0)
