"""What all recall tasks share: text to hide something in, a question, and how a task draws one."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from lola_vllm.evaluation import EvalError

# --- real text to hide needles in: sentences of held-out documents

# Lists and tables have no full stops; pieces of this size keep prompts close to their length.
MAX_WORDS = 40
# A sentence ends in punctuation, perhaps quoted, before a space. Coarse, but a needle only has to
# stand between two sentences most of the time.
_QUOTES = "\"'\u2018\u2019\u201c\u201d"
_SENTENCE_END = re.compile(rf"(?<=[.!?])[{_QUOTES})\]]*\s+(?=[{_QUOTES}(\[]?[A-Z0-9])")


def split_sentences(document: str) -> list[str]:
    """Sentences of a document, at most `MAX_WORDS` long, white space made single spaces."""
    flat = " ".join(document.split())
    ends = [end.end() for end in _SENTENCE_END.finditer(flat)]
    pieces = []
    for start, end in zip([0, *ends], [*ends, len(flat)], strict=True):
        words = flat[start:end].split()
        pieces += [" ".join(words[i : i + MAX_WORDS]) for i in range(0, len(words), MAX_WORDS)]
    return pieces


class RealText(ABC):
    """Units of several documents, read on from a random place. Each kind of text has its own.

    Args:
        documents: texts; one after the other, and from the start again after the last.

    Raises:
        EvalError: there is no unit in them.

    Attributes:
        what: the kind, in a word.
    """

    what = "text"

    def __init__(self, documents: list[str]) -> None:
        self._documents = [units for text in documents if (units := self.split(text))]
        if not self._documents:
            raise EvalError(f"--texts: the documents hold no {self.what}; give some")
        self._weights = [len(units) for units in self._documents]

    @abstractmethod
    def split(self, document: str) -> list[str]:
        """A document's units, between which something can be hidden."""

    def __len__(self) -> int:
        """Units of all documents."""
        return sum(self._weights)

    def start(self, rng: random.Random) -> tuple[int, int]:
        """A random document, longer ones more often, and a random unit of it."""
        (document,) = rng.choices(range(len(self._documents)), weights=self._weights)
        return document, rng.randrange(len(self._documents[document]))

    def read(self, start: tuple[int, int], count: int) -> list[str]:
        """`count` units from `start` on."""
        document, unit = start
        found = self._documents[document][unit : unit + count]
        while len(found) < count:
            document = (document + 1) % len(self._documents)
            found += self._documents[document][: count - len(found)]
        return found


class Prose(RealText):
    """Sentences of several documents, read on from a random place; see `RealText`."""

    what = "prose"

    def split(self, document: str) -> list[str]:
        """See `RealText`."""
        return split_sentences(document)


# --- what all tasks share


@dataclass(frozen=True)
class Question:
    """One question, before any tokenizer or chat template.

    Attributes:
        text: haystack and question. answer_prefix: how the answer is begun for the model.
        expected: strings that the answer must hold.
        depth: share of the haystack before what is asked for, 0 <= depth < 1.
        needed: parts of the text that the answer needs, where those are not `expected` itself.
        begins: the answer must begin with what is expected.
    """

    text: str
    answer_prefix: str
    expected: tuple[str, ...]
    depth: float
    needed: tuple[str, ...] = ()
    begins: bool = False


# From a number of haystack units (lines or sentences) to the question. What is random was drawn
# before, so the same needle lies at the same depth whatever the number.
Draft = Callable[[int], Question]


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: on the command line.
        draw: everything random about one question, given the only source of randomness; where the
            needle that is asked for should lie, 0 <= depth < 1; tokens of the whole prompt, for
            tasks that scale more than the haystack; real text of the kind that the task needs.
        answer_room: tokens left free for the answer within the prompt's length.
        needs: the kind of real text that `draw` must be given; None: none.
        several_places: whether the answer is hidden in more than one place.
    """

    name: str
    draw: Callable[[random.Random, float, int, RealText | None], Draft]
    answer_room: int
    needs: type[RealText] | None = None
    several_places: bool = False


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
