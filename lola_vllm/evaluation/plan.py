"""What every setting of a comparison is asked: questions, their rows, numbers and table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lola_vllm.evaluation.results import Record, Row


@dataclass(frozen=True)
class Plan(ABC):
    """An evaluation.

    Attributes:
        name: of its files.
        keys: fields of a row that no other one has the same, and settings are paired by.
        read_in_pieces: whether `reader.Reader` is asked, not vLLM's engine.
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ("kind", "index")
    read_in_pieces: ClassVar[bool] = False

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Longest sequence of a LoLA model in tokens."""

    @property
    def softmax_length(self) -> int:
        """Fewest tokens that a softmax model must take."""
        return self.max_length

    def check(self) -> None:  # noqa: B027  (most have nothing to refuse)
        """Refuse what cannot be asked.

        Raises:
            EvalError: says what and why.
        """

    def done(self, rows: list[Row]) -> set[tuple[Any, ...]]:
        """What `run` need not ask again, given rows of an earlier call."""
        return {tuple(row.get(key, 0) for key in self.keys) for row in rows}

    @abstractmethod
    def run(self, model: Any, done: Collection[tuple[Any, ...]] = ()) -> Iterator[list[Row]]:
        """Ask a model everything.

        Args:
            model: an `engine.EngineModel`, or a `reader.Reader` where the plan is read in pieces.
            done: see the method of that name.

        Yields:
            The rows of every few questions, which are JSON objects.

        Raises:
            EvalError: texts or lengths that have no room for a question.
        """

    @abstractmethod
    def numbers(self, record: Record, reference: Record | None) -> Row:
        """What the rows of a record say, for its JSON."""

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
