"""From samples to the numbers of a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lola_vllm.eval.errors import EvalError
from lola_vllm.eval.intervals import exp_mean, wilson

DEPTH_BINS = 5


@dataclass(frozen=True)
class Cell:
    """Recall of one task at one length, or of a part of its samples.

    Attributes:
        samples: their number. exact: how many were answered exactly.
        low, high: Wilson's 95 % interval of the share of exact answers.
        match: mean share of expected strings that were found (RULER's score).
        share: mean share of characters that were right.
    """

    samples: int
    exact: int
    low: float
    high: float
    match: float
    share: float

    @property
    def rate(self) -> float:
        """Share of exact answers."""
        return self.exact / self.samples

    def to_json(self) -> dict[str, Any]:
        """All fields and the rate."""
        return {**vars(self), "rate": self.rate}


def recall_cell(samples: Sequence[dict[str, Any]]) -> Cell:
    """Summarize at least one sample of `recall.RecallPlan`."""
    n = len(samples)
    exact = sum(sample["exact"] for sample in samples)
    low, high = wilson(exact, n)
    match, share = (sum(sample[key] for sample in samples) / n for key in ("match", "share"))
    return Cell(n, exact, low, high, match, share)


def recall_cells(samples: Iterable[dict[str, Any]]) -> dict[tuple[str, int], Cell]:
    """Cells by task and length, in the order of their first samples."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for sample in samples:
        groups.setdefault((sample["task"], sample["length"]), []).append(sample)
    return {key: recall_cell(group) for key, group in groups.items()}


def beyond_window(
    samples: Iterable[dict[str, Any]], lola_config: dict[str, Any]
) -> list[dict[str, Any]]:
    """The samples whose needle no sliding window can hold when the answer begins.

    A needle among the last lines is read by softmax attention, sparse cache or not: these samples
    alone tell what the rest of the state remembers.

    Args:
        samples: of `recall.RecallPlan`. lola_config: the setting's parameters, all of them.
    """
    span = lola_config["window_size"] + lola_config["update_interval"]  # the most it ever holds
    return [sample for sample in samples if sample.get("distance", 0) >= span]


def depth_bin(depth: float) -> int:
    """The bin of a depth, 0 to `DEPTH_BINS` - 1."""
    return min(DEPTH_BINS - 1, int(depth * DEPTH_BINS))


@dataclass(frozen=True)
class Reading:
    """Perplexity on one kind of text; triples are a value and its 95 % bootstrap interval.

    Attributes:
        windows, tokens: read and predicted. perplexity: per token.
        bits_per_byte: of the text in UTF-8; comparable between tokenizers.
        ratio: perplexity over the reference's on the same windows, paired; None without one.
    """

    windows: int
    tokens: int
    perplexity: tuple[float, float, float]
    bits_per_byte: float
    ratio: tuple[float, float, float] | None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return dict(vars(self))


def readings(
    samples: Sequence[dict[str, Any]],
    reference: Sequence[dict[str, Any]] | None,
    seed: int = 0,
) -> dict[str, Reading]:
    """Perplexities by kind of text, and of all kinds together as "all".

    Args:
        samples: of `perplexity.PerplexityPlan`. reference: of the reference model, same windows.
        seed: of the bootstrap.

    Raises:
        EvalError: the reference read other tokens: its tokenizer is another one.
    """
    by_window = {(row["kind"], row["index"]): row for row in reference or ()}
    kinds = list(dict.fromkeys(sample["kind"] for sample in samples))
    result = {}
    for kind in [*kinds, *(["all"] if len(kinds) > 1 else [])]:
        rows = [sample for sample in samples if kind in ("all", sample["kind"])]
        nats, tokens, size = (_column(rows, key) for key in ("nats", "tokens", "bytes"))
        ratio = None
        if reference is not None:
            others = [by_window.get((row["kind"], row["index"])) for row in rows]
            if any(
                o is None or o["checksum"] != r["checksum"]
                for o, r in zip(others, rows, strict=True)
            ):
                raise EvalError(
                    "--reference: its windows hold other tokens; perplexities compare only "
                    "between models of one tokenizer (bits per byte compare always)"
                )
            ratio = exp_mean(nats - _column([o for o in others if o], "nats"), tokens, seed)
        result[kind] = Reading(
            windows=len(rows),
            tokens=int(tokens.sum()),
            perplexity=exp_mean(nats, tokens, seed),
            bits_per_byte=float(nats.sum() / math.log(2) / size.sum()),
            ratio=ratio,
        )
    return result


def _column(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([row[key] for row in rows], dtype=np.float64)
