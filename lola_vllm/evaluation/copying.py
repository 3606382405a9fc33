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
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from lola_vllm.core.cli_options import option
from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.copy_texts import Kinds, Text
from lola_vllm.evaluation.models import Emit, Prediction, Stop
from lola_vllm.evaluation.plan import Plan, at_least, numbers, words
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
ROOM = 128  # tokens for a prefix and a question, with what a chat template writes around it


def default_lengths() -> list[int]:
    """Of texts: one that fits in the demo model's state, and one that does not."""
    return [2000, 7000]


def default_distances() -> list[int]:
    """Tokens from the beginning of a passage to the question."""
    return [250, 500, 1000, 2000, 3000, 4500, 6000]


@dataclass(frozen=True)
class CopyPlan(Plan):
    """The passages that every setting is asked for; JSON values only.

    A cell is a kind of text, a length of texts and a distance.
    """

    name: ClassVar[str] = "copy"
    keys: ClassVar[tuple[str, ...]] = ("kind", "length", "index")
    read_in_pieces: ClassVar[bool] = True

    texts: str = option(
        "a text file or a directory of them; held-out documents are read",
        metavar="PATH",
    )
    kinds: list[str] = option(
        "of prose, documentation, code and chat, or names of files (default: all that the texts "
        "have)",
        [],
        type=words,
    )
    lengths: list[int] = option("tokens of a text", default_lengths(), type=numbers)
    distances: list[int] = option(
        "tokens from a passage to the end of what was read, within a tenth; a text is asked for "
        "those that it holds",
        default_distances(),
        type=numbers,
    )
    samples: int = option("texts of each kind and length, at most", 4, type=at_least(1))
    stops: int = option(
        f"places at the end of a text at which passages are asked, {STOP_TOKENS} tokens apart",
        4,
        type=at_least(1),
    )
    passages: int = option("per distance and stop, at most", 4, type=at_least(1))
    seed: int = option("of all choices", 0)

    @property
    def asked(self) -> str:
        """See `Plan`."""
        lengths = ", ".join(f"{length:,}" for length in self.lengths)
        return f"up to {self.samples} texts of each kind and length ({lengths} tokens)"

    @property
    def max_length(self) -> int:
        """See `Plan`."""
        return max(self.lengths) + ROOM

    @property
    def softmax_length(self) -> int:
        """See `Plan`; of longer texts a softmax model sees the last tokens."""
        return FLOOR + ROOM

    @property
    def tokens(self) -> int:
        """Tokens of all texts and of the passages that are begun again, at most."""
        kinds = Kinds.read(Path(self.texts), self.kinds).files
        return len(kinds) * self.samples * sum(map(self._tokens_of, self.lengths))

    def cost(self, sample: Row) -> int:
        """See `Plan`."""
        return self._tokens_of(sample["length"])

    def _tokens_of(self, length: int) -> int:
        passages = self.stops * len(self.distances_in(length)) * self.passages
        return length + passages * PASSAGE

    def distances_in(self, length: int) -> list[int]:
        """The distances that texts of `length` tokens are asked for: those that each stop holds."""
        return [d for d in self.distances if d <= length - (self.stops - 1) * STOP_TOKENS]

    def check(self) -> None:
        """See `Plan`."""
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

    def run(self, model: Reader, emit: Emit, done: Collection[tuple[Any, ...]] = ()) -> None:
        """Let `model` read all texts; see `Plan`."""
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

    def _row(self, model: Reader, text: Text, length: int) -> Row:
        """Ask for a text's passages: its line in the results."""
        rng = random.Random(f"{self.seed}/{text.kind}/{length}/{text.number}")
        passages = self._draw(text, length, model.tokenizer.special, rng)
        stops = [
            Stop(at, [(text.bridge + text.ids[p : p + PASSAGE], ASKED) for _, p in places])
            for at, places in passages.items()
        ]
        answers = model.ask(text.ids, stops, FLOOR)
        cells = []
        for distance in self.distances_in(length):
            of_distance = [
                (answer, i, stop - p)
                for answer, (stop, places) in zip(answers, passages.items(), strict=True)
                for i, (of, p) in enumerate(places)
                if of == distance
            ]
            cell = {"distance": distance, **_sums([answer.read[i] for answer, i, _ in of_distance])}
            floor = [answer.floor[i] for answer, i, _ in of_distance if answer.floor is not None]
            if floor:
                cell |= {f"floor_{key}": value for key, value in _sums(floor).items()}
            cell["seen"] = all(answer.reach >= back for answer, _, back in of_distance)
            cells.append(cell)
        asked = [f"Stop(at={at}, questions={[ids for ids, _ in of]})" for at, of in stops]
        return {
            "kind": text.kind,
            "source": text.source,
            "length": length,
            "index": text.number,
            # Settings are compared passage by passage: they must be the same.
            "checksum": zlib.crc32(f"[{', '.join(asked)}]".encode()),
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

    def numbers(self, record: Record, reference: Record | None) -> Row:
        """See `Plan`."""
        return {
            "cells": [
                {
                    "kind": kind,
                    "length": length,
                    "distance": distance,
                    **cell,
                    **record.bytes_json(length),
                }
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
        for i, cell in enumerate(row["cells"]):
            if cell["passages"]:
                key = row["kind"], row["length"], cell["distance"]
                found.setdefault(key, []).append((cell, other["cells"][i] if other else None))
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
