"""The interfaces of models and tokenizers that evaluations use, in process or on a server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lola_vllm.evaluation import EvalError

# A function that gets an event, {"event": ..., ...} of JSON values.
Emit = Callable[[dict[str, Any]], None]


class Tokenizer(Protocol):
    """A tokenizer as evaluations use it, in process or on a server."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Tokens of `text`; with `special`, those the model expects around a prompt as well."""

    def chat(self, message: str) -> list[int]:
        """Tokens of a chat in which the user said `message`, up to where the answer begins."""

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens."""


class LocalTokenizer:
    """The tokenizer of a model directory.

    Attributes:
        special: ids of tokens that no text contains.
        has_chat: whether there is a chat template.

    Raises:
        EvalError: there is none that transformers can load.
    """

    def __init__(self, path: Path) -> None:
        # Otherwise it warns in every child process. This code does not tokenize in parallel.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer

        if not path.is_dir():
            raise EvalError(f"{path}: no such directory; give one that holds a tokenizer")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises exceptions of many kinds
            raise EvalError(f"{path}: its tokenizer cannot be loaded ({error})") from error
        if not self._tokenizer.encode("The quick brown fox"):
            raise EvalError(f"{path}: its tokenizer gives no tokens; copy tokenizer.json there")
        self._name = path
        self.special = frozenset(self._tokenizer.all_special_ids)
        self.has_chat = bool(self._tokenizer.chat_template)
        # Prompts beyond the context length that the tokenizer states are measured on purpose.
        self._tokenizer.model_max_length = 2**62

    def encode(self, text: str, *, special: bool) -> list[int]:
        """See `Tokenizer.encode`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        return ids

    def chat(self, message: str) -> list[int]:
        """See `Tokenizer.chat`.

        Raises:
            EvalError: the model has no chat template.
        """
        if not self.has_chat:
            raise EvalError(
                f"--format chat: {self._name} has no chat template; use --format completion"
            )
        text = self.conversation([("user", message)], begun=True)
        return self.encode(text, special=False)  # the template writes the special tokens

    def conversation(self, messages: list[tuple[str, str]], *, begun: bool) -> str:
        """A conversation as the chat template writes it, special tokens as text.

        Args:
            messages: role and content of each. begun: open the assistant's next turn.
        """
        made = [{"role": role, "content": content} for role, content in messages]
        return str(
            self._tokenizer.apply_chat_template(made, tokenize=False, add_generation_prompt=begun)
        )

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer.decode`."""
        return str(self._tokenizer.decode(ids))


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


class Model(Protocol):
    """A model that answers several prompts at once.

    Attributes:
        tokenizer: the model's. batch: number of prompts to give in one call.
    """

    tokenizer: Tokenizer
    batch: int

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        """Greedy continuations, at most `max_tokens` tokens each, without special tokens."""

    def predictions(self, windows: list[list[int]]) -> list[list[Prediction]]:
        """How well every token of each window is predicted from those before it.

        Returns:
            Per window of n tokens n - 1 predictions: the first token has none.
        """


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
