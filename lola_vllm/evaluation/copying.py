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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.held_out import read_kinds
from lola_vllm.evaluation.models import Prediction, Stop, Tokenizer, prefix_of
from lola_vllm.evaluation.plan import Plan
from lola_vllm.evaluation.results import (
    Record,
    Row,
    column,
    markdown,
    paired,
    share,
    times,
)

if TYPE_CHECKING:
    from lola_vllm.evaluation.reader import Reader

GIVEN = 12  # tokens of a passage that are given again
ASKED = 12  # tokens after them that are predicted
PASSAGE = GIVEN + ASKED
FLOOR = 200  # tokens before a question that the floor sees
BAND = 1.1  # passages for a distance d begin d / BAND to d * BAND tokens before the stop
STOP_TOKENS = 128  # between two places of a text at which passages are asked
LEAST_DISTANCE = 250  # a nearer passage could be among the tokens that the floor sees
ROOM = 128  # tokens for a prefix and a question
LENGTHS = [2000, 7000]  # one that fits in the demo model's state, and one that does not
DISTANCES = [250, 500, 1000, 2000, 3000, 4500, 6000]


class Text(NamedTuple):
    """What is read before passages of it are asked for.

    Attributes:
        kind: of text. source: file that it comes from. number: among those of its kind.
        ids: `prefix` and exactly as many tokens as its length says.
        prefix: number of leading ids that no document contains.
    """

    kind: str
    source: str
    number: int
    ids: list[int]
    prefix: int


@dataclass(frozen=True)
class CopyPlan(Plan):
    """The passages that every setting is asked for.

    A cell is a kind of text, a length of texts and a distance. Attributes beside the options are
    `stops`, the places at the end of a text at which passages are asked, and `passages`, how many
    are asked at most per distance and stop.
    """

    name: ClassVar[str] = "copy"
    keys: ClassVar[tuple[str, ...]] = ("kind", "length", "index", "distance")
    read_in_pieces: ClassVar[bool] = True

    texts: str
    kinds: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: list(LENGTHS))
    distances: list[int] = field(default_factory=lambda: list(DISTANCES))
    samples: int = 4
    seed: int = 0
    stops: int = 4
    passages: int = 4

    @property
    def max_length(self) -> int:
        return max(self.lengths) + ROOM

    @property
    def softmax_length(self) -> int:
        return FLOOR + ROOM  # of longer texts a softmax model sees the last tokens

    def distances_in(self, length: int) -> list[int]:
        """The distances that texts of `length` tokens are asked for: those that each stop holds."""
        return [d for d in self.distances if d <= length - (self.stops - 1) * STOP_TOKENS]

    def check(self) -> None:
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
                    f"{max(0, length - before)}; ask for longer texts or shorter distances"
                )

    def run(self, model: Reader, done: Collection[tuple[Any, ...]] = ()) -> Iterator[list[Row]]:
        """Let `model` read all texts; see `Plan`."""
        kinds = read_kinds(Path(self.texts), self.kinds)
        for length in self.lengths:
            found = 0
            for kind, files in kinds.items():
                for text in self._texts(model.tokenizer, kind, files, length):
                    found += 1
                    if (kind, length, text.number, self.distances_in(length)[0]) not in done:
                        yield self._rows(model, text, length)
            if not found:
                raise EvalError(
                    f"--lengths {length}: no kind of text at --texts {self.texts} has so many "
                    "held-out tokens; ask for shorter texts or give more text"
                )

    def _texts(
        self, tokenizer: Tokenizer, kind: str, files: dict[str, list[str]], length: int
    ) -> Iterator[Text]:
        """Up to `samples` texts of `length` tokens that share none, the same for every model.

        Files of a kind take turns. A text is held-out documents one after the other, an empty line
        between them, and may begin and end amid a document.
        """
        rng = random.Random(f"{self.seed}/{kind}/{length}")
        prefix = prefix_of(tokenizer)
        of_file = []
        for name, documents in files.items():
            ids = tokenizer.encode("\n\n".join(documents) + "\n\n", special=False)
            pieces = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
            rng.shuffle(pieces)
            of_file.append([(name, piece) for piece in pieces])
        rng.shuffle(of_file)
        most = max(map(len, of_file), default=0)
        in_turn = [pieces[i] for i in range(most) for pieces in of_file if i < len(pieces)]
        for number, (name, piece) in enumerate(in_turn[: self.samples]):
            yield Text(kind, name, number, prefix + piece, len(prefix))

    def _rows(self, model: Reader, text: Text, length: int) -> list[Row]:
        """Ask for a text's passages: a row for each distance."""
        rng = random.Random(f"{self.seed}/{text.kind}/{length}/{text.number}")
        passages = self._draw(text, length, model.tokenizer.special, rng)
        bridge = model.tokenizer.encode("\n", special=False)
        stops = [
            Stop(at, [(bridge + text.ids[p : p + PASSAGE], ASKED) for _, p in places])
            for at, places in passages.items()
        ]
        answers = model.ask(text.ids, stops, FLOOR)
        asked = [f"Stop(at={at}, questions={[ids for ids, _ in of]})" for at, of in stops]
        of_text = {
            "kind": text.kind,
            "source": text.source,
            "length": length,
            "index": text.number,
            # Settings are compared passage by passage: they must be the same.
            "checksum": zlib.crc32(f"[{', '.join(asked)}]".encode()),
        }
        rows = []
        for distance in self.distances_in(length):
            of_distance = [
                (answer, i, stop - p)
                for answer, (stop, places) in zip(answers, passages.items(), strict=True)
                for i, (of, p) in enumerate(places)
                if of == distance
            ]
            row = {"distance": distance, **_sums([answer.read[i] for answer, i, _ in of_distance])}
            floor = [answer.floor[i] for answer, i, _ in of_distance if answer.floor is not None]
            if floor:
                row |= {f"floor_{key}": value for key, value in _sums(floor).items()}
            row["seen"] = all(answer.reach >= back for answer, _, back in of_distance)
            rows.append(of_text | row)
        return rows

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

    def numbers(self, record: Record, reference: Record | None) -> Row:
        return {
            "cells": [
                {"kind": kind, "length": length, "distance": distance, **cell}
                for (kind, length, distance), cell in copy_cells(record, reference).items()
            ]
        }

    def table(self, records: Sequence[Record], reference: Record | None) -> str:
        """A table of each kind and length of text: settings by distances."""
        found = [copy_cells(record, reference) for record in records]
        keys = list(dict.fromkeys(key for cells in found for key in cells))
        blocks = []
        for kind, length in dict.fromkeys(key[:2] for key in keys):
            of_kind = sorted(key for key in keys if key[:2] == (kind, length))
            rows = [["setting", *(f"{distance:,}" for *_, distance in of_kind)]]
            for record, cells in zip(records, found, strict=True):
                shown = [cells.get(key) for key in of_kind]
                rows.append([record.setting.name, *map(_show, shown)])
                if any(cell and cell["floor_exact"] for cell in shown):
                    rows.append(["- not read", *map(_show_floor, shown)])
            counts = [cell for cells in found for key, cell in cells.items() if key in of_kind]
            texts = max(cell["texts"] for cell in counts)
            passages = [cell["passages"] for cell in counts]
            blocks.append(
                f"### {kind}, {length:,} tokens\n\n{markdown(rows)}\n\n{texts} texts, "
                f"{min(passages)} to {max(passages)} passages a column."
            )
        blocks.append(
            f"By tokens from a passage to the question: exact ones of the {ASKED} tokens that "
            f"follow the passage's first {GIVEN}, mean log-probability of a token in parentheses, "
            "and the share of the reference's gain in log-probability with its 95 % interval over "
            f"texts. The gain is over what the reference says after the last {FLOOR} tokens alone "
            "(not read)."
        )
        return "\n\n".join(blocks)


def _sums(answers: list[list[Prediction]]) -> dict[str, Any]:
    """Sums over passages."""
    return {
        "passages": len(answers),
        "tokens": sum(map(len, answers)),
        "exact": sum(value.first for answer in answers for value in answer),
        "nats": -sum(value.logprob for answer in answers for value in answer),
    }


# --- numbers

# A kind of text, tokens of a text, tokens back.
Cell: TypeAlias = tuple[str, int, int]


def copy_cells(record: Record, reference: Record | None) -> dict[Cell, Row]:
    """Cells by kind, length and distance.

    Returns:
        Of `_cell`.

    Raises:
        EvalError: as `paired`.
    """
    found: dict[Cell, list[tuple[Row, Row | None]]] = {}
    for row, other in paired(record, reference, CopyPlan.keys):
        if row["passages"]:
            key = row["kind"], row["length"], row["distance"]
            found.setdefault(key, []).append((row, other))
    return {key: _cell(cells) for key, cells in found.items()}


def _cell(pairs: list[tuple[Row, Row | None]]) -> Row:
    """Passages of one distance in several texts.

    Returns:
        texts, passages, tokens: read, begun again, and predicted. exact: share of tokens that are
        the first choice. logprob: mean natural log-probability of a token. floor_exact,
        floor_logprob: of a softmax model after the last tokens alone, else None. gain: (logprob -
        floor) / (the reference's logprob - floor), of the same passages; None without a reference,
        and where that could not see the passages or gains nothing. Shares have an interval,
        resampled over texts.
    """
    cells, others = [cell for cell, _ in pairs], [other for _, other in pairs if other]
    tokens, passages = column(cells, "tokens"), column(cells, "passages")
    found: Row = {"texts": len(cells), "passages": int(passages.sum()), "tokens": int(tokens.sum())}
    found["exact"] = share(column(cells, "exact"), tokens)
    found["logprob"] = share(-column(cells, "nats"), tokens)
    found |= dict.fromkeys(("floor_exact", "floor_logprob", "gain"))
    if all("floor_exact" in cell for cell in cells):
        found["floor_exact"] = share(column(cells, "floor_exact"), tokens)
        found["floor_logprob"] = share(-column(cells, "floor_nats"), tokens)
    if others and all("floor_exact" in other and other["seen"] for other in others):
        floor, whole = column(others, "floor_nats"), column(others, "nats")
        if (floor - whole).sum() > 0:
            found["gain"] = share(floor - column(cells, "nats"), floor - whole)
    return found


def _show(cell: Row | None) -> str:
    if cell is None:
        return ""
    exact = f"{cell['exact'][0]:.0%} ({cell['logprob'][0]:.2f})"
    return exact + times(cell["gain"], 2, cell["texts"])


def _show_floor(cell: Row | None) -> str:
    if cell is None or cell["floor_exact"] is None:
        return ""
    return f"{cell['floor_exact'][0]:.0%} ({cell['floor_logprob'][0]:.2f})"
