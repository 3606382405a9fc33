"""What an evaluation asks of a model, wherever it runs."""

from __future__ import annotations

from typing import Protocol

from lola_vllm.eval.tokenizer import Tokenizer


class Model(Protocol):
    """A model that answers several prompts at once.

    Attributes:
        tokenizer: the model's. batch: prompts worth giving in one call.
    """

    tokenizer: Tokenizer
    batch: int

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        """Greedy continuations, at most `max_tokens` tokens each, without special tokens."""

    def logprobs(self, windows: list[list[int]]) -> list[list[float]]:
        """Natural log-probability of every token of each window given those before it.

        Returns:
            Per window of n tokens n - 1 numbers: the first token has none.
        """
