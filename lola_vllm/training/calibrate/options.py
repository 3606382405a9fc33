"""The options of a calibration, without anything heavy to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CalibrateOptions:
    """What is read, and how many pairs there are to give.

    Attributes:
        pairs: of a KV head, on average. least: pairs of any KV head.
        recent: more pairs of a KV head, on average, for its newest tokens; heads that copy share
            them.
        state_worth: what a hidden state must be worth to be kept, in nats a token; 0 keeps all.
            Heads that do without leave their memory to pairs.
        prompts: to read.
        prompt_length: of every other four, in tokens; the rest have half of it.
        facts: share of the prompts that hide facts in text and ask for them at the end.
        dtype: of the softmax model's weights; bfloat16 reads faster where the machine has it.
        seed: of the choice of prompts.
    """

    pairs: int = 128
    least: int = 16
    recent: int = 0
    state_worth: float = 0.0
    prompts: int = 56
    prompt_length: int = 4096
    facts: float = 0.75
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
