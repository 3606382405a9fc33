"""What results of all evaluations share: records of settings, intervals, pairs, and tables."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.settings import SequenceMemory, Setting

Row: TypeAlias = dict[str, Any]  # of JSON values
Triple: TypeAlias = tuple[float, float, float]  # a value and its 95 % interval


# --- records: the results of one setting, as a file keeps them


@dataclass
class Record:
    """Samples of one setting, and the conditions of their measurement.

    Attributes:
        setting: that was measured. fingerprint: of the model's files.
        memory: what a sequence costs, None if unknown.
        samples: rows of the plan that was run. dtype: the model's, None if unknown.
        seconds: time that the samples took, with starts of engines.
        finished: whether the plan has no more samples.
    """

    setting: Setting
    fingerprint: str | None = None
    memory: SequenceMemory | None = None
    samples: list[Row] = field(default_factory=list)
    dtype: str | None = None
    seconds: float = 0.0
    finished: bool = False

    @property
    def identity(self) -> Row:
        """The values that must agree for samples of two runs to be comparable. Models by name."""
        return {
            "name": self.setting.name,
            "model": self.setting.model.name,
            "fingerprint": self.fingerprint,
            "overrides": self.setting.lola_config,
            "without": self.setting.without or None,
        }

    def to_json(self) -> Row:
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

    def take_up(self, row: Row) -> None:
        """Go on with the values of `to_json` and their samples."""
        self.samples = list(row["samples"])
        self.dtype, self.seconds, self.finished = row["dtype"], row["seconds"], row["finished"]


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


# --- intervals: of a share of successes, of shares of sums, and of perplexities and their ratio

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


def share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> Triple:
    """sum of part / sum of whole over windows, with a bootstrap interval over windows.

    Args:
        part, whole: `[W]`, one number per window. The sum of `whole` is not 0.

    Returns:
        Value, and the 2.5 and 97.5 percentiles of resampled values, an infinite one where the sum
        of `whole` is 0 in many resamples.
    """
    picks = np.random.default_rng(0).integers(0, len(part), size=(RESAMPLES, len(part)))
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may ask for nothing
        shares = part[picks].sum(axis=1) / whole[picks].sum(axis=1)
    # Between two infinite shares, linear interpolation would give NaN.
    low, high = np.nanpercentile(shares, [2.5, 97.5], method="nearest")
    return float(part.sum() / whole.sum()), float(low), float(high)


def exp_mean(nats: NDArray[np.float64], tokens: NDArray[np.float64]) -> Triple:
    """exp(sum of nats / sum of tokens) over windows, with an interval as `share` has it.

    With negative log-likelihoods this is perplexity. With differences of them, taken window by
    window, it is a ratio of perplexities, and the pairing removes the variation between texts.
    """
    value, low, high = map(math.exp, share(nats, tokens))
    return value, low, high


def column(rows: Iterable[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """`[N]`, a value of each row."""
    return np.array([row[key] for row in rows], dtype=np.float64)


# --- samples of a setting beside those of the reference


def paired(
    record: Record, reference: Record | None, keys: Sequence[str]
) -> list[tuple[Row, Row | None]]:
    """A record's samples, each with the reference's of the same `keys`.

    The reference's are None until it has read everything, and for the reference itself.

    Raises:
        EvalError: the reference read other tokens: its tokenizer is another one.
    """
    if reference is None or reference is record or not reference.finished:
        return [(row, None) for row in record.samples]
    others = {tuple(row[key] for key in keys): row for row in reference.samples}
    found: list[tuple[Row, Row | None]] = []
    for row in record.samples:
        other = others.get(tuple(row[key] for key in keys))
        if other is None or other["checksum"] != row["checksum"]:
            raise EvalError(
                "--reference: it read other tokens; these results compare only between models of "
                "one tokenizer (bits per byte compare always)"
            )
        found.append((row, other))
    return found


# --- tables


def markdown(rows: list[list[str]]) -> str:
    """A table whose columns also line up as plain text; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * widths[0]}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(rows[0]), f"| {' | '.join(rule)} |", *map(line, rows[1:])])


def times(ratio: Triple | None, digits: int, windows: int) -> str:
    """ ", 1.05x [1.04, 1.06]", or nothing for None.

    An interval says nothing where one window alone can be resampled.
    """
    if ratio is None:
        return ""
    value, low, high = (f"{number:.{digits}f}" for number in ratio)
    return f", {value}x [{low}, {high}]" if windows > 1 else f", {value}x [-]"
