"""How well one model predicts real text that no training has seen."""

from __future__ import annotations

import random
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lola_vllm.core.cli_options import option
from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import Emit, Model, Prediction, Tokenizer, prefix_of
from lola_vllm.evaluation.repeats import Repeats, find_repeats
from lola_vllm.evaluation.settings import read_held_out


@dataclass(frozen=True)
class PerplexityPlan:
    """The text that every setting reads; JSON values only."""

    name: ClassVar[str] = "perplexity"

    texts: str = option(
        "a text file or a directory of them, each a kind; held-out documents are read",
        type=Path,
        metavar="PATH",
    )
    windows: int = option("per kind of text, at most", 16)
    window_length: int = option("in tokens", 1024)
    seed: int = option("of all choices", 0)

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens: engines insist on generating one after the window."""
        return self.window_length + 1

    @property
    def tokens(self) -> int:
        """Tokens that a setting costs, at most."""
        return len(read_held_out(Path(self.texts))) * self.windows * self.window_length

    def cost(self, sample: dict[str, Any]) -> int:
        """Tokens that a sample of `run` counts for in `tokens`."""
        return self.window_length

    def done(self, samples: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
        """Windows that `run` need not read again, given samples of an earlier call."""
        return {(row["kind"], row["index"]) for row in samples}

    def run(self, model: Model, emit: Emit, done: Collection[tuple[Any, ...]] = ()) -> None:
        """Let `model` read all windows.

        Args:
            model: gives log-probabilities. emit: is given
                `{"event": "samples", "samples": [...]}` after every `model.batch` windows.
            done: see the method of that name.

        Raises:
            EvalError: no kind of text fills a window.
        """
        prefix = prefix_of(model.tokenizer)
        pieces = _Pieces(model.tokenizer)
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
                    repeats = find_repeats(ids, [pieces[token] for token in ids])
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


class _Pieces(dict[int, str]):
    """The text of single tokens, each asked of the tokenizer once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        self[token] = self._tokenizer.decode([token])
        return self[token]


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
