"""How well one model predicts real text that no training has seen."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.held_out import read_held_out
from lola_vllm.evaluation.models import Prediction, Tokenizer, prefix_of
from lola_vllm.evaluation.plan import Plan
from lola_vllm.evaluation.results import (
    Record,
    Row,
    column,
    exp_mean,
    markdown,
    paired,
    times,
)

if TYPE_CHECKING:
    from lola_vllm.evaluation.engine import EngineModel


@dataclass(frozen=True)
class PerplexityPlan(Plan):
    """The text that every setting reads. Fields are options of `lola-vllm eval perplexity`."""

    name: ClassVar[str] = "perplexity"

    texts: str
    windows: int = 16
    window_length: int = 1024
    seed: int = 0

    @property
    def max_length(self) -> int:
        return self.window_length + 1  # engines insist on generating a token after the window

    def run(
        self, model: EngineModel, done: Collection[tuple[Any, ...]] = ()
    ) -> Iterator[list[Row]]:
        """Let `model` read all windows, `model.batch` at once; see `Plan`."""
        tokenizer = model.tokenizer
        prefix = prefix_of(tokenizer)
        found = 0
        for kind, documents in read_held_out(Path(self.texts)).items():
            windows = self._windows(kind, documents, tokenizer, len(prefix))
            found += len(windows)
            windows = [(index, ids) for index, ids in windows if (kind, index) not in done]
            for at in range(0, len(windows), model.batch):
                batch = windows[at : at + model.batch]
                predictions = model.predictions([prefix + ids for _, ids in batch])
                # Tokens that open the text are not counted. Without them the first token is given,
                # not predicted.
                yield [
                    reading(kind, index, ids, values[-len(ids if prefix else ids[1:]) :], tokenizer)
                    for (index, ids), values in zip(batch, predictions, strict=True)
                ]
        if not found:
            raise EvalError(
                f"--window-length {self.window_length}: no kind of text at --texts {self.texts} "
                "has so many held-out tokens; ask for shorter windows or give more text"
            )

    def _windows(
        self, kind: str, documents: list[str], tokenizer: Tokenizer, reserved: int
    ) -> list[tuple[int, list[int]]]:
        """Up to `windows` runs of tokens with their numbers in the kind's text, in order.

        The documents stand one after the other, an empty line between them, and windows do not
        overlap. `reserved` tokens of each are for the tokens that open it.
        """
        ids: list[int] = []
        for document in documents:
            ids += tokenizer.encode(document + "\n\n", special=False)
        size = self.window_length - reserved
        numbers = list(range(len(ids) // size))
        if len(numbers) > self.windows:
            chosen = random.Random(f"{self.seed}/{kind}").sample(numbers, self.windows)
            numbers = sorted(chosen)
        return [(number, ids[number * size : (number + 1) * size]) for number in numbers]

    def numbers(self, record: Record, reference: Record | None) -> Row:
        return {"kinds": readings(record, reference)}

    def table(self, records: Sequence[Record], reference: Record | None) -> str:
        """A table of kinds of text by settings."""
        found = [readings(record, reference) for record in records]
        rows = [["text", "windows", *(record.setting.name for record in records)]]
        for kind in dict.fromkeys(kind for by_kind in found for kind in by_kind):
            of_kind = [by_kind.get(kind) for by_kind in found]
            windows = max(row["windows"] for row in of_kind if row)
            rows.append([kind, f"{windows}", *map(_show, of_kind)])
        over = "" if reference is None else ", and times the reference's with a 95 % interval"
        return f"{markdown(rows)}\n\nPerplexity per token, bits per byte (b/B){over}."


def reading(
    kind: str, index: int, ids: list[int], values: list[Prediction], tokenizer: Tokenizer
) -> Row:
    """The row of a window or a block, of which the tokens of the last `values` are predicted."""
    return {
        "kind": kind,
        "index": index,
        "tokens": len(values),
        "bytes": len(tokenizer.decode(ids[-len(values) :]).encode("utf-8")),
        "nats": -sum(value.logprob for value in values),
        # Settings are compared window by window: they must be the same.
        "checksum": zlib.crc32(repr(ids).encode()),
    }


def readings(record: Record, reference: Record | None) -> dict[str, Row]:
    """Perplexities by kind of text, and of all kinds together as "all".

    Returns:
        windows, tokens: read and predicted. perplexity: per token. bits_per_byte: of the text in
        UTF-8; comparable between tokenizers. ratio: perplexity over the reference's on the same
        windows; None without one. Triples are a value and its interval.

    Raises:
        EvalError: as `paired`.
    """
    pairs = paired(record, reference, PerplexityPlan.keys)
    kinds = list(dict.fromkeys(row["kind"] for row, _ in pairs))
    result = {}
    for kind in [*kinds, *(["all"] if len(kinds) > 1 else [])]:
        of_kind = [pair for pair in pairs if kind in ("all", pair[0]["kind"])]
        rows, others = [row for row, _ in of_kind], [other for _, other in of_kind if other]
        nats, tokens = column(rows, "nats"), column(rows, "tokens")
        bits = float(nats.sum() / math.log(2) / column(rows, "bytes").sum())
        result[kind] = {
            "windows": len(rows),
            "tokens": int(tokens.sum()),
            "perplexity": exp_mean(nats, tokens),
            "bits_per_byte": bits,
            "ratio": exp_mean(nats - column(others, "nats"), tokens) if others else None,
        }
    return result


def _show(row: Row | None) -> str:
    if row is None:
        return ""
    text = f"{row['perplexity'][0]:.2f}, {row['bits_per_byte']:.3f} b/B"
    return text + times(row["ratio"], 3, row["windows"])
