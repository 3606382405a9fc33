"""The tokenizer of a model, what a model is asked, and what it expects."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from lola_vllm.evaluation import EvalError


class Tokenizer:
    """The tokenizer of a model directory.

    Attributes:
        special: ids of tokens that no text contains.

    Raises:
        EvalError: there is none that transformers can load.
    """

    def __init__(self, path: Path) -> None:
        # Otherwise it warns in every child process. This code does not tokenize in parallel.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises exceptions of many kinds
            raise EvalError(f"{path}: its tokenizer cannot be loaded ({error})") from error
        if not self._tokenizer.encode("The quick brown fox"):
            raise EvalError(f"{path}: its tokenizer gives no tokens; copy tokenizer.json there")
        self._path = path
        self.special = frozenset(self._tokenizer.all_special_ids)
        # Prompts beyond the context length that the tokenizer states are measured on purpose.
        self._tokenizer.model_max_length = 2**62

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Tokens of `text`; with `special`, those the model expects around a prompt as well."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens."""
        return str(self._tokenizer.decode(ids))

    def conversation(self, messages: list[tuple[str, str]], *, begun: bool) -> str:
        """A conversation as the chat template writes it, special tokens as text.

        Args:
            messages: role and content of each. begun: open the assistant's next turn.

        Raises:
            EvalError: the model has no chat template.
        """
        if not self._tokenizer.chat_template:
            raise EvalError(f"{self._path}: has no chat template, which conversations need")
        made = [{"role": role, "content": content} for role, content in messages]
        return str(
            self._tokenizer.apply_chat_template(made, tokenize=False, add_generation_prompt=begun)
        )


def prefix_of(tokenizer: Tokenizer) -> list[int]:
    """Tokens that a tokenizer puts before a text, such as a beginning-of-sequence token."""
    plain, special = tokenizer.encode("A", special=False), tokenizer.encode("A", special=True)
    return special[: special.index(plain[0])] if plain[0] in special else []


class Prediction(NamedTuple):
    """What a model expected at a place of a text.

    Attributes:
        logprob: natural log-probability of the token that stands there.
        first: whether that token is the most likely one.
    """

    logprob: float
    first: bool


class Stop(NamedTuple):
    """A place of a text at which questions are asked, all from the state after it.

    Attributes:
        at: tokens of the text before it.
        questions: tokens of each with its right answer, and how many the answer has.
    """

    at: int
    questions: list[tuple[list[int], int]]


class Answers(NamedTuple):
    """What a model expects at a stop; both hold a prediction of each token of each answer.

    Attributes:
        read: after the text. floor: after its last tokens alone; None for a LoLA model.
        reach: tokens before the stop that the model could see.
    """

    read: list[list[Prediction]]
    floor: list[list[Prediction]] | None
    reach: int
