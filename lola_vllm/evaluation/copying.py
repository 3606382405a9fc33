"""Whether a model can go on word by word with what it read: verbatim recall over distance.

A text is read. Then a passage of it is begun again, as if the text went on with its first tokens,
and the tokens that followed them are predicted. Every passage is asked from the same state, so a
question changes nothing for the next one.

Three things are measured on the same passages: a LoLA model, the softmax model that it comes from,
and the floor, which is the softmax model after the last `FLOOR` tokens alone. What LoLA gains over
the floor, as a share of what the softmax model gains, is how much of the text it still has.
"""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from lola_vllm.core.cli_options import option
from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.copy_texts import ChatTokenizer, Kinds, Text
from lola_vllm.evaluation.models import Emit, Prediction

GIVEN = 12  # tokens of a passage that are given again
ASKED = 12  # tokens after them that are predicted
PASSAGE = GIVEN + ASKED
FLOOR = 200  # tokens before a question that the floor sees
BAND = 1.1  # passages for a distance d begin d / BAND to d * BAND tokens before the stop
STOP_TOKENS = 128  # between two places of a text at which passages are asked
LEAST_DISTANCE = 250  # a nearer passage could be among the tokens that the floor sees
ROOM = 128  # tokens for a prefix and a question, with what a chat template writes around it


class CopyModel(Protocol):
    """A model that is asked several questions from one state.

    Attributes:
        tokenizer: the model's.
    """

    @property
    def tokenizer(self) -> ChatTokenizer: ...

    def ask(self, ids: list[int], stops: Sequence[Stop], longest: int) -> list[Answers]:
        """How well the last `ASKED` tokens of each question are predicted.

        Args:
            ids: of the text. stops: ascending places in it, with their questions.
            longest: tokens of the longest question.

        Returns:
            Per stop.
        """


class Stop(NamedTuple):
    """A place of a text at which questions are asked.

    Attributes:
        at: tokens of the text before it. questions: of equally many tokens each.
    """

    at: int
    questions: list[list[int]]


class Answers(NamedTuple):
    """What a model expects after a stop; both hold `ASKED` predictions per question.

    Attributes:
        read: after the text. floor: after its last `FLOOR` tokens; None for a LoLA model.
        reach: tokens before the stop that the model could see.
    """

    read: list[list[Prediction]]
    floor: list[list[Prediction]] | None
    reach: int


def default_lengths() -> list[int]:
    """Of texts: one that fits in the demo model's state, and one that does not."""
    return [2000, 7000]


def default_distances() -> list[int]:
    """Tokens from the beginning of a passage to the question."""
    return [250, 500, 1000, 2000, 3000, 4500, 6000]


@dataclass(frozen=True)
class CopyPlan:
    """The passages that every setting is asked for; JSON values only.

    A cell is a kind of text, a length of texts and a distance.
    """

    name: ClassVar[str] = "copy"

    texts: str = option(
        "a text file or a directory of them; held-out documents are read",
        type=Path,
        metavar="PATH",
    )
    kinds: list[str] = option(
        "of prose, documentation, code and chat, or names of files (default: all that the texts "
        "have)",
        [],
    )
    lengths: list[int] = option("tokens of a text", default_lengths())
    distances: list[int] = option(
        "tokens from a passage to the end of what was read, within a tenth; a text is asked for "
        "those that it holds",
        default_distances(),
    )
    samples: int = option("texts of each kind and length, at most", 4)
    stops: int = option(
        f"places at the end of a text at which passages are asked, {STOP_TOKENS} tokens apart", 4
    )
    passages: int = option("per distance and stop, at most", 4)
    seed: int = option("of all choices", 0)

    @property
    def max_length(self) -> int:
        """Longest sequence of a LoLA model in tokens."""
        return max(self.lengths) + ROOM

    @property
    def softmax_length(self) -> int:
        """Fewest tokens that a softmax model must take; of longer texts it sees the last ones."""
        return FLOOR + ROOM

    @property
    def tokens(self) -> int:
        """Tokens of all texts and of the passages that are begun again, at most."""
        kinds = Kinds.read(Path(self.texts), self.kinds).files
        return len(kinds) * self.samples * sum(map(self._tokens_of, self.lengths))

    def cost(self, sample: dict[str, Any]) -> int:
        """Tokens that a sample of `run` counts for in `tokens`."""
        return self._tokens_of(sample["length"])

    def _tokens_of(self, length: int) -> int:
        passages = self.stops * len(self.distances_in(length)) * self.passages
        return length + passages * PASSAGE

    def done(self, samples: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
        """Texts that `run` need not read again, given samples of an earlier call."""
        return {(row["kind"], row["length"], row["index"]) for row in samples}

    def distances_in(self, length: int) -> list[int]:
        """The distances that texts of `length` tokens are asked for: those that each stop holds."""
        return [d for d in self.distances if d <= length - (self.stops - 1) * STOP_TOKENS]

    def check(self) -> None:
        """Refuse lengths and distances that cannot be asked.

        Raises:
            EvalError: a distance that the floor could see, or a length that holds none.
        """
        if min(self.distances) < LEAST_DISTANCE:
            raise EvalError(
                f"--distances {min(self.distances)}: must be at least {LEAST_DISTANCE}, as the "
                f"floor sees the last {FLOOR} tokens"
            )
        for length in self.lengths:
            if not self.distances_in(length):
                before = (self.stops - 1) * STOP_TOKENS
                raise EvalError(
                    f"--lengths {length}: holds none of the --distances "
                    f"{', '.join(map(str, self.distances))}, which must be at most "
                    f"{max(0, length - before)}; ask for longer texts, shorter distances or fewer "
                    f"--stops than {self.stops}"
                )

    def run(self, model: CopyModel, emit: Emit, done: Collection[tuple[Any, ...]] = ()) -> None:
        """Let `model` read all texts.

        Args:
            model: is asked. emit: is given `{"event": "samples", "samples": [row]}` after every
                text. done: see the method of that name.

        Raises:
            EvalError: no kind has a text of some length.
        """
        kinds = Kinds.read(Path(self.texts), self.kinds, model.tokenizer.has_chat)
        for length in self.lengths:
            found = 0
            for kind in kinds.files:
                for text in kinds.texts(model.tokenizer, kind, length, self.samples, self.seed):
                    found += 1
                    if (kind, length, text.number) not in done:
                        row = self._row(model, text, length)
                        emit({"event": "samples", "samples": [row]})
            if not found:
                raise EvalError(
                    f"--lengths {length}: no kind of text at --texts {self.texts} has so many "
                    "held-out tokens; ask for shorter texts or give more text"
                )

    def _row(self, model: CopyModel, text: Text, length: int) -> dict[str, Any]:
        """Ask for a text's passages: its line in the results."""
        rng = random.Random(f"{self.seed}/{text.kind}/{length}/{text.number}")
        passages = self._draw(text, length, model.tokenizer.special, rng)
        stops = [
            Stop(at, [text.bridge + text.ids[p : p + PASSAGE] for _, p in places])
            for at, places in passages.items()
        ]
        answers = model.ask(text.ids, stops, len(text.bridge) + PASSAGE)
        cells = []
        for distance in self.distances_in(length):
            asked = [
                (answer, i, stop - p)
                for answer, (stop, places) in zip(answers, passages.items(), strict=True)
                for i, (of, p) in enumerate(places)
                if of == distance
            ]
            cell = {"distance": distance, **_sums([answer.read[i] for answer, i, _ in asked])}
            floor = [answer.floor[i] for answer, i, _ in asked if answer.floor is not None]
            if floor:
                cell |= {f"floor_{key}": value for key, value in _sums(floor).items()}
            cell["seen"] = all(answer.reach >= back for answer, _, back in asked)
            cells.append(cell)
        return {
            "kind": text.kind,
            "source": text.source,
            "length": length,
            "index": text.number,
            # Settings are compared passage by passage: they must be the same.
            "checksum": zlib.crc32(repr(stops).encode()),
            "cells": cells,
        }

    def _draw(
        self, text: Text, length: int, special: Collection[int], rng: random.Random
    ) -> dict[int, list[tuple[int, int]]]:
        """By stop, distance and first token of each passage. No token is asked for twice.

        Passages that hold special tokens are left out, and those whose given tokens stand in the
        text more than once: it would not say how they go on.
        """
        ids, free = text.ids, set(range(text.prefix, len(text.ids)))
        places = range(text.prefix, len(ids) - PASSAGE + 1)
        passage_starts = Counter(tuple(ids[p : p + GIVEN]) for p in places)
        end = text.prefix + length
        stops = [end - STOP_TOKENS * i for i in reversed(range(self.stops))]
        found: dict[int, list[tuple[int, int]]] = {stop: [] for stop in stops}
        for stop in stops:
            for distance in self.distances_in(length):
                first = max(text.prefix, stop - int(distance * BAND))
                last = stop - math.ceil(distance / BAND)
                # Every ASKED-th place, so that as many passages as possible fit in.
                offset = rng.randrange(min(ASKED, max(1, last - first + 1)))
                choices = [
                    p
                    for p in range(first + offset, last + 1, ASKED)
                    if free.issuperset(range(p + GIVEN, p + PASSAGE))
                    and passage_starts[tuple(ids[p : p + GIVEN])] == 1
                    and not any(token in special for token in ids[p : p + PASSAGE])
                ]
                for p in sorted(rng.sample(choices, min(self.passages, len(choices)))):
                    free.difference_update(range(p + GIVEN, p + PASSAGE))
                    found[stop].append((distance, p))
        return found


def _sums(answers: list[list[Prediction]]) -> dict[str, Any]:
    """Sums over passages; `whole` counts those of which every asked token is the first choice."""
    return {
        "passages": len(answers),
        "tokens": sum(map(len, answers)),
        "exact": sum(value.first for answer in answers for value in answer),
        "whole": sum(all(value.first for value in answer) for answer in answers),
        "nats": -sum(value.logprob for answer in answers for value in answer),
    }
