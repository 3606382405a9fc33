"""Results of an evaluation: one record per setting, JSON for machines, Markdown for people."""

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

from lola_vllm.eval import EvalError
from lola_vllm.eval.settings import Memory, Setting

# --- records: the results of one setting, as a file keeps them


@dataclass
class Record:
    """Samples of one setting, and the conditions of their measurement.

    Attributes:
        setting: that was measured. fingerprint: of the model's files; None for a server.
        memory: what a sequence costs, None if unknown.
        samples: rows of the plan that was run. dtype: the model's, None if unknown.
        seconds: time that the samples took, with starts of engines.
        selections: made by another score than the self-recall error, over all layers.
        finished: whether the plan has no more samples.
    """

    setting: Setting
    fingerprint: str | None = None
    memory: Memory | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    dtype: str | None = None
    seconds: float = 0.0
    selections: int = 0
    finished: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """The values that must agree for samples of two runs to be comparable. Models by name."""
        return {
            "name": self.setting.name,
            "model": self.setting.model.name,
            "fingerprint": self.fingerprint,
            "overrides": self.setting.lola_config,
            "score": self.setting.score,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything but the samples."""
        memory = self.memory
        return {
            **self.identity,
            "lola_config": memory.lola_config if memory else None,
            "selections_by_other_score": self.selections,
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
        self.selections, self.finished = row["selections_by_other_score"], row["finished"]


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


# --- summaries: from samples to the numbers of a table

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

    Softmax attention over the window reads a needle among the last lines, also without a sparse
    cache. So only these samples show what the rest of the state recalls.

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


# --- JSON and tables

MIB = 2**20


def recall_json(records: list[Record]) -> list[dict[str, Any]]:
    """Per setting: its record, its cells, its samples."""
    rows = []
    for record in records:
        beyond = _beyond_window(record)
        cells = [
            {
                "task": task,
                "length": length,
                **cell.to_json(),
                "beyond_window": beyond[task, length].to_json()
                if (task, length) in beyond
                else None,
                "bytes_per_sequence": record.memory.bytes_at(length) if record.memory else None,
                "full_kv_over_bytes": record.memory.saving_at(length) if record.memory else None,
            }
            for (task, length), cell in recall_cells(record.samples).items()
        ]
        rows.append({**record.to_json(), "cells": cells, "samples": record.samples})
    return rows


def perplexity_json(records: list[Record], reference: Record | None) -> list[dict[str, Any]]:
    """Per setting: its record, perplexities by kind, its windows."""
    return [
        {
            **record.to_json(),
            "kinds": {kind: r.to_json() for kind, r in _readings(record, reference).items()},
            "samples": record.samples,
        }
        for record in records
    ]


def recall_table(records: list[Record]) -> str:
    """A Markdown table per task, settings by lengths, and one of the memory they take."""
    cells = [recall_cells(record.samples) for record in records]
    keys = list(dict.fromkeys(key for found in cells for key in found))
    lengths = sorted({length for _, length in keys})
    header = ["setting", *(f"{length:,}" for length in lengths)]
    beyond = [_beyond_window(record) for record in records]
    blocks = []
    for task in dict.fromkeys(task for task, _ in keys):
        rows = []
        for record, whole, part in zip(records, cells, beyond, strict=True):
            rows.append([record.setting.name, *(_show(whole.get((task, n))) for n in lengths)])
            if part:
                rows.append(["- beyond the window", *(_show(part.get((task, n))) for n in lengths)])
        blocks.append(f"### {task}\n\n{markdown([header, *rows])}")
    blocks.append(
        "Exact answers by tokens of prompt and answer, Wilson's 95 % interval in brackets; parts: "
        "share of characters right (vt: of names). Beyond the window: the samples whose needle "
        "is farther from the prompt's end than the window reaches."
    )
    if any(record.memory for record in records):
        rows = [
            [record.setting.name, *(_show_memory(record.memory, length) for length in lengths)]
            for record in records
        ]
        blocks.append(f"### Memory per sequence\n\n{markdown([header, *rows])}")
        blocks.append("MiB, and how many times larger a full KV cache is.")
    return "\n\n".join(blocks)


def _beyond_window(record: Record) -> dict[tuple[str, int], Cell]:
    if record.memory is None or record.memory.lola_config is None:
        return {}
    return recall_cells(beyond_window(record.samples, record.memory.lola_config))


def perplexity_table(records: list[Record], reference: Record | None) -> str:
    """A Markdown table: kinds of text by settings."""
    found = [_readings(record, reference) for record in records]
    kinds = list(dict.fromkeys(kind for by_kind in found for kind in by_kind))
    rows = [["text", "windows", *(record.setting.name for record in records)]]
    for kind in kinds:
        of_kind = [by_kind.get(kind) for by_kind in found]
        windows = max(reading.windows for reading in of_kind if reading)
        rows.append([kind, f"{windows}", *map(_show_reading, of_kind)])
    note = (
        "Perplexity per token, bits per byte (b/B)"
        + ("" if reference is None else ", and times the reference's with a 95 % interval")
        + "."
    )
    return f"{markdown(rows)}\n\n{note}"


def _readings(record: Record, reference: Record | None) -> dict[str, Reading]:
    if reference is None or reference is record or not reference.finished:
        return readings(record.samples, None)
    return readings(record.samples, reference.samples)


def _show(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = f"{cell.rate:.0%} [{cell.low:.0%}, {cell.high:.0%}]"
    return text if cell.exact == cell.samples else f"{text} parts {cell.share:.0%}"


def _show_memory(memory: Memory | None, length: int) -> str:
    if memory is None:
        return "?"
    return f"{memory.bytes_at(length) / MIB:.1f}, {memory.saving_at(length):.1f}x"


def _show_reading(reading: Reading | None) -> str:
    if reading is None:
        return ""
    text = f"{reading.perplexity[0]:.2f}, {reading.bits_per_byte:.3f} b/B"
    if reading.ratio is not None:
        value, low, high = reading.ratio
        text += f", {value:.3f}x [{low:.3f}, {high:.3f}]"
    return text


def markdown(rows: list[list[str]]) -> str:
    """A table whose columns also line up as plain text; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * widths[0]}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(rows[0]), f"| {' | '.join(rule)} |", *map(line, rows[1:])])


def write(path: Path, value: dict[str, Any]) -> None:
    """Write JSON in one step, so that an interrupted run leaves the last complete file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
