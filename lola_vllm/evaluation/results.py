"""Results of an evaluation: one record per setting, its numbers, and JSON for machines."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.settings import SequenceMemory, Setting

# --- records: the results of one setting, as a file keeps them


@dataclass
class Record:
    """Samples of one setting, and the conditions of their measurement.

    Attributes:
        setting: that was measured. fingerprint: of the model's files; None for a server.
        memory: what a sequence costs, None if unknown.
        samples: rows of the plan that was run. dtype: the model's, None if unknown.
        seconds: time that the samples took, with starts of engines.
        finished: whether the plan has no more samples.
    """

    setting: Setting
    fingerprint: str | None = None
    memory: SequenceMemory | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    dtype: str | None = None
    seconds: float = 0.0
    finished: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """The values that must agree for samples of two runs to be comparable. Models by name."""
        return {
            "name": self.setting.name,
            "model": self.setting.model.name,
            "fingerprint": self.fingerprint,
            "overrides": self.setting.lola_config,
            "without": self.setting.without or None,
            "positions": self.setting.positions,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything but the samples."""
        memory = self.memory
        return {
            **self.identity,
            "lola_config": memory.lola_config if memory else None,
            "dtype": self.dtype,
            "state_bytes": memory.state_bytes if memory else None,
            "full_kv_bytes_per_token": memory.full_kv_bytes_per_token if memory else None,
            "seconds": round(self.seconds, 1),
            "finished": self.finished,
        }

    def take_up(self, row: dict[str, Any]) -> None:
        """A record from the values of `to_json` and its samples."""
        self.samples = list(row["samples"])
        self.dtype, self.seconds = row["dtype"], row["seconds"]
        self.finished = row["finished"]


def fingerprint(model: Path) -> str:
    """A hash of a model directory's config, tokenizer and weights, 16 hexadecimal digits.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    files = [model / "config.json", model / "tokenizer.json", *sorted(model.glob("*.safetensors"))]
    for path in files:
        if not path.is_file():
            continue
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:16]


# --- confidence intervals: of a share of successes, and of perplexities and their ratio

Z_95 = 1.959963984540054
RESAMPLES = 2000


def wilson(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95 % by default.

    Unlike the normal approximation it stays within [0, 1] and has a width at 0 and at all.

    Raises:
        ValueError: no trial, or successes outside 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # At the ends the exact bound is 0 or 1; rounding must not change it.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def exp_mean(
    nats: NDArray[np.float64], tokens: NDArray[np.float64], seed: int = 0
) -> tuple[float, float, float]:
    """exp(sum of nats / sum of tokens) over windows, with a bootstrap interval.

    With negative log-likelihoods this is perplexity. With differences of them, taken window by
    window, it is a ratio of perplexities, and the pairing removes the variation between texts.

    Args:
        nats: `[W]`, one sum per window. tokens: `[W]`, tokens that were summed.
        seed: of the resampling over windows.

    Returns:
        Value, and the 2.5 and 97.5 percentiles of resampled values.

    Raises:
        ValueError: no window, or arrays of different lengths.
    """
    if len(nats) == 0 or nats.shape != tokens.shape:
        raise ValueError(f"{nats.shape} sums for {tokens.shape} counts of tokens")
    value = math.exp(nats.sum() / tokens.sum())
    picks = np.random.default_rng(seed).integers(0, len(nats), size=(RESAMPLES, len(nats)))
    means = nats[picks].sum(axis=1) / tokens[picks].sum(axis=1)
    low, high = np.exp(np.percentile(means, [2.5, 97.5]))
    return value, float(low), float(high)


def share(
    part: NDArray[np.float64], whole: NDArray[np.float64], seed: int = 0
) -> tuple[float, float, float]:
    """sum of part / sum of whole over windows, with a bootstrap interval as `exp_mean` has it.

    Args:
        part, whole: `[W]`, one number per window. seed: of the resampling over windows.

    Returns:
        Value, and the 2.5 and 97.5 percentiles; NaN where the sum of `whole` is 0, and an infinite
        percentile where it is 0 in many resamples.
    """
    if not whole.sum():
        return math.nan, math.nan, math.nan
    picks = np.random.default_rng(seed).integers(0, len(part), size=(RESAMPLES, len(part)))
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may ask for nothing
        shares = part[picks].sum(axis=1) / whole[picks].sum(axis=1)
    # Between two infinite shares, linear interpolation would give NaN.
    low, high = np.nanpercentile(shares, [2.5, 97.5], method="nearest")
    return float(part.sum() / whole.sum()), float(low), float(high)


# --- summaries: from samples to the numbers of a table


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

    Softmax attention over the window reads a needle among the last lines, also without a sparse
    cache. So only these samples show what the rest of the state recalls.

    Args:
        samples: of `recall.RecallPlan`. lola_config: the setting's parameters, all of them.
    """
    span = lola_config["window_size"] + lola_config["update_interval"]  # the most it ever holds
    return [sample for sample in samples if sample.get("distance", 0) >= span]


@dataclass(frozen=True)
class Reading:
    """Perplexity on one kind of text; triples are a value and its 95 % bootstrap interval.

    Attributes:
        windows, tokens: read and predicted. perplexity: per token.
        bits_per_byte: of the text in UTF-8; comparable between tokenizers.
        ratio: perplexity over the reference's on the same windows, paired; None without one.
        repeats: what the text says again (`repeats.py`); None where it says nothing again.
    """

    windows: int
    tokens: int
    perplexity: tuple[float, float, float]
    bits_per_byte: float
    ratio: tuple[float, float, float] | None
    repeats: Recurrence | None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {**vars(self), "repeats": vars(self.repeats) if self.repeats else None}


@dataclass(frozen=True)
class Recurrence:
    """How well repeats are predicted; triples as in `Reading`, ratios over the reference's.

    Attributes:
        words: last words of sentences that were asked for. cloze: share that was predicted whole.
        cloze_ratio: that share over the reference's.
        tokens: that complete a repeated n-gram. perplexity: of these.
        first: share of these that are the first choice.
        ratio: perplexity over the reference's.
    """

    words: int
    cloze: tuple[float, float, float]
    cloze_ratio: tuple[float, float, float] | None
    tokens: int
    perplexity: tuple[float, float, float]
    first: float
    ratio: tuple[float, float, float] | None


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
        ratio, paired = None, None
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
            paired = [other for other in others if other]
            ratio = exp_mean(nats - _column(paired, "nats"), tokens, seed)
        result[kind] = Reading(
            windows=len(rows),
            tokens=int(tokens.sum()),
            perplexity=exp_mean(nats, tokens, seed),
            bits_per_byte=float(nats.sum() / math.log(2) / size.sum()),
            ratio=ratio,
            repeats=recurrence(rows, paired, seed),
        )
    return result


def recurrence(
    rows: Sequence[dict[str, Any]], paired: Sequence[dict[str, Any]] | None, seed: int
) -> Recurrence | None:
    """What windows say again; `paired` are the reference's, window by window.

    None where the windows say nothing again, or were read before this was measured.
    """
    if not all("cloze" in row for row in [*rows, *(paired or ())]):
        return None
    columns = {
        key: _column(rows, key)
        for key in ("cloze", "cloze_exact", "repeated", "repeated_nats", "repeated_first")
    }
    tokens = columns["repeated"]
    if not tokens.sum() or not columns["cloze"].sum():
        return None
    ratios: dict[str, tuple[float, float, float] | None] = {"cloze": None, "nats": None}
    if paired is not None:
        ratios["cloze"] = share(columns["cloze_exact"], _column(paired, "cloze_exact"), seed)
        nats = columns["repeated_nats"] - _column(paired, "repeated_nats")
        ratios["nats"] = exp_mean(nats, tokens, seed)
    return Recurrence(
        words=int(columns["cloze"].sum()),
        cloze=share(columns["cloze_exact"], columns["cloze"], seed),
        cloze_ratio=ratios["cloze"],
        tokens=int(tokens.sum()),
        perplexity=exp_mean(columns["repeated_nats"], tokens, seed),
        first=float(columns["repeated_first"].sum() / tokens.sum()),
        ratio=ratios["nats"],
    )


def _column(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([row[key] for row in rows], dtype=np.float64)


# --- JSON

MIB = 2**20


def recall_json(records: list[Record]) -> list[dict[str, Any]]:
    """Per setting: its record, its cells, its samples."""
    rows = []
    for record in records:
        beyond = cells_beyond_window(record)
        cells = [
            {
                "task": task,
                "length": length,
                **cell.to_json(),
                "beyond_window": beyond[task, length].to_json()
                if (task, length) in beyond
                else None,
                **bytes_json(record, length),
            }
            for (task, length), cell in recall_cells(record.samples).items()
        ]
        rows.append({**record.to_json(), "cells": cells, "samples": record.samples})
    return rows


def bytes_json(record: Record, length: int) -> dict[str, float | None]:
    """What a sequence of `length` tokens takes, None where that is not known."""
    memory = record.memory
    return {
        "bytes_per_sequence": memory.bytes_at(length) if memory else None,
        "full_kv_over_bytes": memory.saving_at(length) if memory else None,
    }


def perplexity_json(records: list[Record], reference: Record | None) -> list[dict[str, Any]]:
    """Per setting: its record, perplexities by kind, its windows."""
    return [
        {
            **record.to_json(),
            "kinds": {kind: r.to_json() for kind, r in readings_of(record, reference).items()},
            "samples": record.samples,
        }
        for record in records
    ]


def cells_beyond_window(record: Record) -> dict[tuple[str, int], Cell]:
    """Cells of `beyond_window`; none where the setting is no LoLA model."""
    if record.memory is None or record.memory.lola_config is None:
        return {}
    return recall_cells(beyond_window(record.samples, record.memory.lola_config))


def readings_of(record: Record, reference: Record | None) -> dict[str, Reading]:
    """A record's `readings`, beside the reference's once that has read everything."""
    if reference is None or reference is record or not reference.finished:
        return readings(record.samples, None)
    return readings(record.samples, reference.samples)


def write(path: Path, value: dict[str, Any]) -> None:
    """Write JSON in one step, so that an interrupted run leaves the last complete file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
