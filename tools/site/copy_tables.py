"""The table of passages that are begun again: docs/recall.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.site.summaries import table

Runs = Callable[[str], list[dict[str, Any]]]
Cells = dict[tuple[str, int, int], dict[str, Any]]

NAME = "recall-copy"
REFERENCE, SHIPPED = "reference", "as it ships"
PROSE = "prose"
LENGTH = 7000  # of the texts that are shown


def cells(runs: Runs, setting: str) -> Cells:
    """A setting's cells of all runs by kind, length and distance."""
    return {
        (cell["kind"], cell["length"], cell["distance"]): cell
        for run in runs(NAME)
        for row in run["settings"]
        if row["name"] == setting
        for cell in row["cells"]
    }


def percent(value: float) -> str:
    """A share in whole percent."""
    return f"{100 * value:.0f} %"


def exact(cell: dict[str, Any], part: str = "") -> str:
    """Exact tokens, and the mean log-probability of a token."""
    return f"{percent(cell[part + 'exact'][0])} ({cell[part + 'logprob'][0]:.2f})"


def gain(cell: dict[str, Any]) -> str:
    """Share of the base's gain with its interval over texts."""
    value, low, high = cell["gain"]
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def columns(distances: list[int]) -> list[str]:
    """Their names."""
    first, *others = distances
    return [f"{first:,} tokens back", *(f"{distance:,}" for distance in others)]


def prose(runs: Runs) -> str:
    """Base, LoLA, floor and share of the gain in prose of `LENGTH` tokens."""
    base, lola = (cells(runs, name) for name in (REFERENCE, SHIPPED))
    keys = sorted(key for key in lola if key[:2] == (PROSE, LENGTH))
    rows = {
        "softmax base": [exact(base[key]) for key in keys],
        "**as it ships**": [exact(lola[key]) for key in keys],
        "floor, not read": [exact(base[key], "floor_") for key in keys],
        "**share of the base's gain**": [gain(lola[key]) for key in keys],
    }
    lines = [["", *columns([distance for *_, distance in keys])]]
    return table([*lines, *([label, *shown] for label, shown in rows.items())])


TABLES: dict[str, Callable[[Runs], str]] = {NAME: prose}
