"""Numbers of `eval copy`: recall of passages and its share of what the softmax base gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.results import Record, bytes_json, share

TOGETHER = "all"
Triple: TypeAlias = tuple[float, float, float]
Key: TypeAlias = tuple[str, int, int]


@dataclass(frozen=True)
class CopyCell:
    """Passages of one kind of text, one length and one distance, or of all kinds.

    Triples are a value and its 95 % bootstrap interval, resampled over texts.

    Attributes:
        texts, passages, tokens: read, begun again, and predicted.
        exact: share of tokens that are the first choice.
        logprob: mean natural log-probability of a token.
        whole: share of passages of which every token is the first choice.
        floor_exact, floor_logprob: of a softmax model after the last tokens alone, else None.
        gain_exact: (exact - floor) / (the reference's exact - floor), of the same passages; None
            without a reference, and where that could not see the passages or gains nothing.
        gain: the same of log-probabilities.
    """

    texts: int
    passages: int
    tokens: int
    exact: Triple
    logprob: Triple
    whole: float
    floor_exact: Triple | None = None
    floor_logprob: Triple | None = None
    gain_exact: Triple | None = None
    gain: Triple | None = None


def copy_cells(
    samples: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]] | None, seed: int = 0
) -> dict[Key, CopyCell]:
    """Cells by kind, length and distance; kind "all" as well if there are several.

    Args:
        samples: of `copying.CopyPlan`. reference: of the softmax base, same texts.
        seed: of the bootstrap.

    Raises:
        EvalError: the reference was asked for other passages: its tokenizer is another one.
    """
    others = {(row["kind"], row["length"], row["index"]): row for row in reference or ()}
    pairs: dict[Key, list[tuple[dict[str, Any], dict[str, Any] | None]]] = {}
    kinds = list(dict.fromkeys(row["kind"] for row in samples))
    for together in (False, True) if len(kinds) > 1 else (False,):
        for row in samples:
            other = others.get((row["kind"], row["length"], row["index"]))
            if reference is not None and (other is None or other["checksum"] != row["checksum"]):
                raise EvalError(
                    "--reference: it was asked for other passages; recall compares only between "
                    "models of one tokenizer"
                )
            for i, cell in enumerate(row["cells"]):
                if cell["passages"]:
                    kind = TOGETHER if together else row["kind"]
                    key = kind, row["length"], cell["distance"]
                    pairs.setdefault(key, []).append((cell, other["cells"][i] if other else None))
    return {key: _cell(cells, seed) for key, cells in pairs.items()}


def _cell(pairs: list[tuple[dict[str, Any], dict[str, Any] | None]], seed: int) -> CopyCell:
    cells = [cell for cell, _ in pairs]
    others = [other for _, other in pairs if other is not None]
    tokens, passages = _column(cells, "tokens"), _column(cells, "passages")
    floor_exact = floor_logprob = gain_exact = gain = None
    if all("floor_exact" in cell for cell in cells):
        floor_exact = share(_column(cells, "floor_exact"), tokens, seed)
        floor_logprob = share(-_column(cells, "floor_nats"), tokens, seed)
    if others and all("floor_exact" in other and other["seen"] for other in others):
        floor, whole = _column(others, "floor_exact"), _column(others, "exact")
        gain_exact = _gain(_column(cells, "exact") - floor, whole - floor, seed)
        floor, whole = _column(others, "floor_nats"), _column(others, "nats")
        gain = _gain(floor - _column(cells, "nats"), floor - whole, seed)
    return CopyCell(
        texts=len(cells),
        passages=int(passages.sum()),
        tokens=int(tokens.sum()),
        exact=share(_column(cells, "exact"), tokens, seed),
        logprob=share(-_column(cells, "nats"), tokens, seed),
        whole=float(_column(cells, "whole").sum() / passages.sum()),
        floor_exact=floor_exact,
        floor_logprob=floor_logprob,
        gain_exact=gain_exact,
        gain=gain,
    )


def _gain(part: NDArray[np.float64], whole: NDArray[np.float64], seed: int) -> Triple | None:
    """Share of the reference's gain; None where it gains nothing."""
    return share(part, whole, seed) if whole.sum() > 0 else None


def _column(rows: Sequence[dict[str, Any]], key: str) -> NDArray[np.float64]:
    return np.array([row[key] for row in rows], dtype=np.float64)


def copy_cells_of(record: Record, reference: Record | None) -> dict[Key, CopyCell]:
    """A record's `copy_cells`, beside the reference's once that was asked everything."""
    if reference is None or reference is record or not reference.finished:
        return copy_cells(record.samples, None)
    return copy_cells(record.samples, reference.samples)


def copy_json(records: list[Record], reference: Record | None) -> list[dict[str, Any]]:
    """Per setting: its record, its cells, its texts."""
    return [
        {
            **record.to_json(),
            "cells": [
                {
                    "kind": kind,
                    "length": length,
                    "distance": distance,
                    **vars(cell),
                    **bytes_json(record, length),
                }
                for (kind, length, distance), cell in copy_cells_of(record, reference).items()
            ],
            "samples": record.samples,
        }
        for record in records
    ]
