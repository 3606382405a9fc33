"""What every setting of a comparison is asked: questions, their rows, numbers and table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lola_vllm.evaluation.models import Emit
from lola_vllm.evaluation.results import Record, Row


@dataclass(frozen=True)
class Plan(ABC):
    """An evaluation; its fields are JSON values.

    Attributes:
        name: of its files. command: the words after `lola-vllm eval`, where not the name.
        keys: fields of a row that no other one has the same, and settings are paired by.
        read_in_pieces: whether `reader.Reader` is asked, not vLLM's engine, and no server.
    """

    name: ClassVar[str]
    command: ClassVar[str | None] = None
    keys: ClassVar[tuple[str, ...]] = ("kind", "index")
    read_in_pieces: ClassVar[bool] = False

    @property
    @abstractmethod
    def asked(self) -> str:
        """What a setting is asked, in words."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Longest sequence of a LoLA model in tokens."""

    @property
    def softmax_length(self) -> int:
        """Fewest tokens that a softmax model must take."""
        return self.max_length

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens that a setting costs, at most."""

    @abstractmethod
    def cost(self, sample: Row) -> int:
        """Tokens that a sample of `run` counts for in `tokens`."""

    def check(self) -> None:  # noqa: B027  (most have nothing to refuse)
        """Refuse what cannot be asked.

        Raises:
            EvalError: says what and why.
        """

    def done(self, samples: list[Row]) -> set[tuple[Any, ...]]:
        """What `run` need not ask again, given samples of an earlier call."""
        return {tuple(row.get(key, 0) for key in self.keys) for row in samples}

    @abstractmethod
    def run(self, model: Any, emit: Emit, done: Collection[tuple[Any, ...]] = ()) -> None:
        """Ask a model everything.

        Args:
            model: a `models.Model`, or a `reader.Reader` where the plan is read in pieces.
            emit: is given `{"event": "samples", "samples": [...]}` after every few questions.
            done: see the method of that name.

        Raises:
            EvalError: texts or lengths that have no room for a question.
        """

    @abstractmethod
    def numbers(self, record: Record, reference: Record | None) -> Row:
        """What the samples of a record say, for its JSON."""

    @abstractmethod
    def table(self, records: Sequence[Record], reference: Record | None) -> str:
        """The numbers of all records in Markdown."""


# --- values of options


def words(text: str) -> list[str]:
    """Words with commas between, doubles dropped."""
    return list(dict.fromkeys(text.replace(",", " ").split()))


def numbers(text: str) -> list[int]:
    """Positive whole numbers with commas between, ascending.

    Raises:
        ArgumentTypeError: something else, or none.
    """
    try:
        found = sorted({int(word) for word in words(text)})
    except ValueError:
        raise ArgumentTypeError(f"{text}: must be whole numbers with commas between") from None
    if not found or found[0] < 1:
        raise ArgumentTypeError(f"{text}: must be one or more positive numbers")
    return found


def at_least(least: int) -> Callable[[str], int]:
    """Reads a whole number; `ArgumentTypeError` where it is smaller."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise ArgumentTypeError(f"{value}: must be at least {least}")
        return value

    number.__name__ = "whole number"  # argparse says so where it is none
    return number
