"""What all recall tasks share: a question, and a task that draws questions of any size."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lola_vllm.eval.prose import Prose


@dataclass(frozen=True)
class Question:
    """One question, before any tokenizer or chat template.

    Attributes:
        text: haystack and question. answer_prefix: how the answer is begun for the model.
        expected: strings that the answer must hold.
        depth: share of the haystack before what is asked for, 0 <= depth < 1.
    """

    text: str
    answer_prefix: str
    expected: tuple[str, ...]
    depth: float


# From a number of haystack units (lines or sentences) to the question. What is random was drawn
# before, so the same needle lies at the same depth whatever the number.
Draft = Callable[[int], Question]


class Draw(Protocol):
    """Draws everything random about one question.

    Args:
        rng: its only source of randomness.
        depth: where the needle that is asked for should lie, 0 <= depth < 1.
        length: tokens of the whole prompt, for tasks that scale more than the haystack.
        prose: real text, for the tasks that say they need it.
    """

    def __call__(
        self, rng: random.Random, depth: float, length: int, prose: Prose | None
    ) -> Draft: ...


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: on the command line. about: one line for people.
        draw: see `Draw`. minimum_units: smallest haystack.
        answer_room: tokens left free for the answer within the prompt's length.
        needs_prose: whether `draw` must be given prose.
    """

    name: str
    about: str
    draw: Draw
    answer_room: int
    minimum_units: int = 1
    needs_prose: bool = False


def hide(haystack: list[str], needles: list[tuple[float, str]]) -> tuple[list[str], list[float]]:
    """Put each needle before the haystack's unit at its depth.

    Args:
        haystack: lines or sentences. needles: (depth, sentence).

    Returns:
        The new list, and the depth of each needle as a share of the haystack's units.
    """
    n = len(haystack)
    indices = [int(depth * n) for depth, _ in needles]
    mixed = list(haystack)
    # From the back, so that earlier indices stay what they were.
    for at in sorted(range(len(needles)), key=lambda i: needles[i][0], reverse=True):
        mixed.insert(indices[at], needles[at][1])
    return mixed, [index / n for index in indices]
