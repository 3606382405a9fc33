"""The options of `lola-vllm calibrate`, without anything heavy to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lola_vllm.core.cli_options import option


@dataclass(frozen=True)
class CalibrateOptions:
    """What is read, and how many pairs there are to give."""

    pairs: int = option("of a KV head, on average", 128)
    least: int = option("pairs of any KV head", 16)
    recent: int = option(
        "more pairs of a KV head, on average, for its newest tokens; heads that copy share them", 0
    )
    prompts: int = option("to read", 56)
    prompt_length: int = option("of every other four, in tokens; the rest have half of it", 4096)
    facts: float = option(
        "share of the prompts that hide facts in text and ask for them at the end", 0.75
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "of the softmax model's weights; bfloat16 reads faster where the machine has it", "float32"
    )
    seed: int = option("of the choice of prompts", 0)
