"""Numbers over tokens: perplexity along a stream and its trend, recall over distance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.results import RESAMPLES, Cell, Record, bytes_json, recall_cell

# --- perplexity along a stream

QUARTER = 4
LEAST_RESAMPLED = 4  # blocks; an interval from fewer would say little
TOGETHER = "all"


@dataclass(frozen=True)
class Point:
    """One or several neighbouring blocks.

    Attributes:
        stop: tokens of the stream up to their end. tokens: that were predicted.
        perplexity: per token. ratio: over the reference's on the same tokens; None without one.
    """

    stop: int
    tokens: int
    perplexity: float
    ratio: float | None


@dataclass(frozen=True)
class Trend:
    """How a curve goes on: of the ratio to the reference, or of perplexity without one.

    Attributes:
        change: the last quarter's geometric mean over the first quarter's.
        low, high: its 95 % bootstrap interval over blocks; None where a quarter has few of them.
        per_doubling: the factor for every doubling of the tokens before, by least squares.
    """

    change: float
    low: float | None
    high: float | None
    per_doubling: float


@dataclass(frozen=True)
class Curve:
    """What one setting makes of one kind's stream, or of the longest kinds' together.

    Attributes:
        block: tokens of a block. documents: that the stream is composed of.
        nats: `[N]`, per block. others: `[N]`, the reference's; None without one.
        tokens: `[N]`, predicted in each block. stops: `[N]`, tokens of one stream up to its end.
    """

    block: int
    documents: int
    nats: NDArray[np.float64]
    others: NDArray[np.float64] | None
    tokens: NDArray[np.float64]
    stops: NDArray[np.int64]

    def points(self, most: int | None = None) -> list[Point]:
        """The curve, in at most so many points of equally many blocks."""
        n = len(self.nats)
        size = 1 if most is None else -(-n // most)
        found = []
        for at in range(0, n, size):
            part = slice(at, at + size)
            nats, tokens = self.nats[part].sum(), self.tokens[part].sum()
            ratio = None
            if self.others is not None:
                ratio = math.exp((nats - self.others[part].sum()) / tokens)
            stop = int(self.stops[part][-1])
            found.append(Point(stop, int(tokens), math.exp(nats / tokens), ratio))
        return found

    def trend(self, seed: int = 0) -> Trend:
        """Whether it rises; `seed` is of the bootstrap."""
        levels = (self.nats - (0 if self.others is None else self.others)) / self.tokens
        quarter = max(1, len(levels) // QUARTER)
        first, last = levels[:quarter], levels[-quarter:]
        low = high = None
        if quarter >= LEAST_RESAMPLED:
            rng = np.random.default_rng(seed)
            ends = [
                part[rng.integers(0, quarter, size=(RESAMPLES, quarter))].mean(axis=1)
                for part in (last, first)
            ]
            low, high = map(float, np.exp(np.percentile(ends[0] - ends[1], [2.5, 97.5])))
        doublings = np.log2(self.stops - self.block / 2)
        slope = np.polyfit(doublings, levels, 1)[0]
        return Trend(math.exp(last.mean() - first.mean()), low, high, math.exp(slope))


def curves(
    samples: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]] | None
) -> dict[str, Curve]:
    """Curves by kind of text, and of the longest streams together as "all" if there are several.

    Args:
        samples: of `stream.StreamPlan`; a stream without its second block has no curve yet.
        reference: of the reference model, same blocks.

    Raises:
        EvalError: the reference read other tokens: its tokenizer is another one.
    """
    others = {(row["kind"], row["index"]): row for row in reference or ()}
    found = {}
    for kind in dict.fromkeys(row["kind"] for row in samples):
        rows = sorted((r for r in samples if r["kind"] == kind), key=lambda row: row["index"])
        if len(rows) < 2:
            continue
        paired = None
        if reference is not None:
            paired = [others.get((kind, row["index"])) for row in rows]
            if any(
                o is None or o["checksum"] != r["checksum"]
                for o, r in zip(paired, rows, strict=True)
            ):
                raise EvalError(
                    "--reference: its blocks hold other tokens; perplexities compare only between "
                    "models of one tokenizer"
                )
        found[kind] = Curve(
            block=rows[1]["tokens"],
            documents=rows[-1]["documents"],
            nats=_column(rows, "nats"),
            others=None if paired is None else _column([o for o in paired if o], "nats"),
            tokens=_column(rows, "tokens"),
            stops=np.array([row["stop"] for row in rows]),
        )
    longest = max((len(curve.nats) for curve in found.values()), default=0)
    full = [curve for curve in found.values() if len(curve.nats) == longest]
    if len(full) > 1:
        found[TOGETHER] = _together(full)
    return found


def _together(parts: list[Curve]) -> Curve:
    """Curves of equal length as one."""
    others = [part.others for part in parts if part.others is not None]
    return Curve(
        block=parts[0].block,
        documents=sum(part.documents for part in parts),
        nats=np.sum([part.nats for part in parts], axis=0),
        others=np.sum(others, axis=0) if others else None,
        tokens=np.sum([part.tokens for part in parts], axis=0),
        stops=parts[0].stops,
    )


def _column(rows: Sequence[dict[str, Any]], key: str) -> NDArray[np.float64]:
    return np.array([row[key] for row in rows], dtype=np.float64)


def curves_of(record: Record, reference: Record | None) -> dict[str, Curve]:
    """A record's `curves`, beside the reference's once that has read everything."""
    if reference is None or reference is record or not reference.finished:
        return curves(record.samples, None)
    return curves(record.samples, reference.samples)


def stream_json(records: list[Record], reference: Record | None) -> list[dict[str, Any]]:
    """Per setting: its record, a curve and a trend by kind of text, its blocks."""
    return [
        {
            **record.to_json(),
            "streams": {
                kind: {
                    "documents": curve.documents,
                    "trend": vars(curve.trend()),
                    "points": [vars(point) for point in curve.points()],
                }
                for kind, curve in curves_of(record, reference).items()
            },
            "samples": record.samples,
        }
        for record in records
    ]


# --- recall over distance


def distance_cells(samples: Iterable[dict[str, Any]]) -> dict[tuple[str, int, int], Cell]:
    """Cells by task, length and distance, of the samples that have one, in their order."""
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in samples:
        if row.get("aim"):
            groups.setdefault((row["task"], row["length"], row["aim"]), []).append(row)
    return {key: recall_cell(group) for key, group in groups.items()}


def lines_of(
    cells: Iterable[tuple[str, int, int]], task: str
) -> dict[int | None, list[tuple[int, int]]]:
    """The (length, distance) of a task's cells as lines of a table or picture.

    Returns:
        By length; one line None if each distance has a length of its own.
    """
    pairs = sorted({(length, distance) for name, length, distance in cells if name == task})
    if len({length for length, _ in pairs}) == len({d for _, d in pairs}) == len(pairs):
        return {None: pairs}
    lengths = sorted({length for length, _ in pairs})
    return {length: [pair for pair in pairs if pair[0] == length] for length in lengths}


def distance_json(records: list[Record]) -> list[dict[str, Any]]:
    """Per setting: its record, its cells, its samples."""
    return [
        {
            **record.to_json(),
            "cells": [
                {
                    "task": task,
                    "length": length,
                    "distance": distance,
                    **cell.to_json(),
                    **bytes_json(record, length),
                }
                for (task, length, distance), cell in distance_cells(record.samples).items()
            ],
            "samples": record.samples,
        }
        for record in records
    ]
