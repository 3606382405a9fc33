"""How well one model predicts real text that no training has seen."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from lola_vllm.core.cli_options import option
from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import Emit, Model, Prediction, Tokenizer, prefix_of
from lola_vllm.evaluation.plan import Plan, at_least
from lola_vllm.evaluation.repeats import DISTANCE, NGRAM, Repeats, find_repeats
from lola_vllm.evaluation.results import (
    Record,
    Row,
    column,
    exp_mean,
    markdown,
    paired,
    share,
    times,
)
from lola_vllm.evaluation.settings import read_held_out


@dataclass(frozen=True)
class PerplexityPlan(Plan):
    """The text that every setting reads; JSON values only."""

    name: ClassVar[str] = "perplexity"

    texts: str = option(
        "a text file or a directory of them, each a kind; held-out documents are read",
        metavar="PATH",
    )
    windows: int = option("per kind of text, at most", 16, type=at_least(1))
    window_length: int = option("in tokens", 1024, type=at_least(8))
    seed: int = option("of all choices", 0)

    @property
    def asked(self) -> str:
        """See `Plan`."""
        return f"up to {self.windows} windows of each text ({self.window_length:,} tokens)"

    @property
    def max_length(self) -> int:
        """See `Plan`; engines insist on generating a token after the window."""
        return self.window_length + 1

    @property
    def tokens(self) -> int:
        """See `Plan`."""
        return len(read_held_out(Path(self.texts))) * self.windows * self.window_length

    def cost(self, sample: Row) -> int:
        """See `Plan`."""
        return self.window_length

    def run(self, model: Model, emit: Emit, done: Collection[tuple[Any, ...]] = ()) -> None:
        """Let `model` read all windows, `model.batch` at once; see `Plan`."""
        prefix = prefix_of(model.tokenizer)
        piece = cache(lambda token: model.tokenizer.decode([token]))
        found = 0
        for kind, documents in read_held_out(Path(self.texts)).items():
            windows = self._windows(kind, documents, model.tokenizer, len(prefix))
            found += len(windows)
            windows = [(index, ids) for index, ids in windows if (kind, index) not in done]
            for at in range(0, len(windows), model.batch):
                batch = windows[at : at + model.batch]
                predictions = model.predictions([prefix + ids for _, ids in batch])
                rows = []
                for (index, ids), values in zip(batch, predictions, strict=True):
                    # Tokens that open the text are not counted. Without them the first token is
                    # given, not predicted.
                    scored = ids if prefix else ids[1:]
                    row = {
                        "kind": kind,
                        "index": index,
                        "tokens": len(scored),
                        "bytes": len(model.tokenizer.decode(scored).encode("utf-8")),
                        "nats": -sum(value.logprob for value in values[-len(scored) :]),
                        # Settings are compared window by window: they must be the same.
                        "checksum": zlib.crc32(repr(ids).encode()),
                    }
                    repeats = find_repeats(ids, [piece(token) for token in ids])
                    rows.append(row | _recalled(repeats, len(ids), values))
                emit({"event": "samples", "samples": rows})
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
        """See `Plan`."""
        return {"kinds": readings(record, reference)}

    def table(self, records: Sequence[Record], reference: Record | None) -> str:
        """A table of kinds of text by settings, and one of what they say again."""
        found = [readings(record, reference) for record in records]
        names = [record.setting.name for record in records]
        rows, again = [["text", "windows", *names]], [["said again", "places", *names]]
        for kind in dict.fromkeys(kind for by_kind in found for kind in by_kind):
            of_kind = [by_kind.get(kind) for by_kind in found]
            windows = max(reading["windows"] for reading in of_kind if reading)
            rows.append([kind, f"{windows}", *map(_show_reading, of_kind)])
            repeats = [reading["repeats"] if reading else None for reading in of_kind]
            first = next(filter(None, repeats), None)
            if first:
                cloze, ngrams = [], []
                for one in repeats:
                    cloze.append(_show_cloze(one, windows) if one else "")
                    ngrams.append(_show_ngrams(one, windows) if one else "")
                again.append([f"{kind}: cloze", f"{first['words']}", *cloze])
                again.append([f"{kind}: repeated", f"{first['tokens']}", *ngrams])
        over = "" if reference is None else ", and times the reference's with a 95 % interval"
        blocks = [markdown(rows), f"Perplexity per token, bits per byte (b/B){over}."]
        if len(again) > 1:
            blocks.append(markdown(again))
            blocks.append(
                f"Places whose last time lies more than {DISTANCE} tokens back. Cloze: share of "
                "last words of sentences predicted whole. Repeated: perplexity of tokens that "
                f"complete a repeated {NGRAM}-gram. Both with times the reference's."
            )
        return "\n\n".join(blocks)


def _recalled(repeats: Repeats, length: int, values: list[Prediction]) -> dict[str, float]:
    """What a window's row says of its repeats.

    Args:
        length: tokens of the window. values: predictions, the last of them of its last token.
    """
    # Counted from the end, as predictions of tokens that open the text may come first.
    again = [values[at - length] for at in repeats.ngrams]
    words = [
        all(values[at - length].first for at in range(first, stop)) for first, stop in repeats.words
    ]
    return {
        "repeated": len(again),
        "repeated_nats": -sum(value.logprob for value in again),
        "repeated_first": sum(value.first for value in again),
        "cloze": len(words),
        "cloze_exact": sum(words),
    }


def readings(record: Record, reference: Record | None) -> dict[str, Row]:
    """Perplexities by kind of text, and of all kinds together as "all".

    Returns:
        windows, tokens: read and predicted. perplexity: per token. bits_per_byte: of the text in
        UTF-8; comparable between tokenizers. ratio: perplexity over the reference's on the same
        windows; None without one. repeats: of `_repeats`. Triples are a value and its interval.

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
            "repeats": _repeats(rows, others),
        }
    return result


def _repeats(rows: list[Row], others: list[Row]) -> Row | None:
    """How well windows predict what they say again; `others` are the reference's, if any.

    Returns:
        words: last words of sentences that were asked for. cloze: share that was predicted whole.
        cloze_ratio: that share over the reference's. tokens: that complete a repeated n-gram.
        perplexity, first, ratio: of these, the share that is the first choice, and over the
        reference's. None where the windows say nothing again, or were read before this was
        measured.
    """
    if not all("cloze" in row for row in [*rows, *others]):
        return None
    words, exact, tokens, nats = (
        column(rows, key) for key in ("cloze", "cloze_exact", "repeated", "repeated_nats")
    )
    if not tokens.sum() or not words.sum():
        return None
    cloze_ratio = ratio = None
    if others:
        cloze_ratio = share(exact, column(others, "cloze_exact"))
        ratio = exp_mean(nats - column(others, "repeated_nats"), tokens)
    return {
        "words": int(words.sum()),
        "cloze": share(exact, words),
        "cloze_ratio": cloze_ratio,
        "tokens": int(tokens.sum()),
        "perplexity": exp_mean(nats, tokens),
        "first": float(column(rows, "repeated_first").sum() / tokens.sum()),
        "ratio": ratio,
    }


def _show_reading(reading: Row | None) -> str:
    if reading is None:
        return ""
    text = f"{reading['perplexity'][0]:.2f}, {reading['bits_per_byte']:.3f} b/B"
    return text + times(reading["ratio"], 3, reading["windows"])


def _show_cloze(repeats: Row, windows: int) -> str:
    return f"{repeats['cloze'][0]:.1%}{times(repeats['cloze_ratio'], 2, windows)}"


def _show_ngrams(repeats: Row, windows: int) -> str:
    return f"{repeats['perplexity'][0]:.2f}{times(repeats['ratio'], 3, windows)}"
