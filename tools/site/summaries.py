"""What the makers of tables and pictures share: where summaries lie, and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lola_vllm.eval.results import wilson

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the header."""
    head, *rest = (re.sub(r"(?<=\|) +(?=\|)", " ", f"| {' | '.join(row)} |") for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest]) + "\n"


def pooled(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Runs of `lola-vllm eval recall` that differ in the seed alone, as one run.

    Its `seed` is a list, its cells have the counts of all, and its date is the last one's. Others
    stay as they are.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        recall = run.get("evaluation") == "recall" and "seed" in run.get("plan", {})
        key = _but_for_seed(run) if recall else str(len(found))
        found.setdefault(key, []).append(run)
    return [_pool(same) if len(same) > 1 else same[0] for same in found.values()]


def _but_for_seed(run: Mapping[str, Any]) -> str:
    """What runs that are pooled agree in: all but the seed, the date and what was found."""
    plan = {key: value for key, value in run["plan"].items() if key != "seed"}
    settings = [
        {key: value for key, value in setting.items() if key not in ("seconds", "cells")}
        for setting in run["settings"]
    ]
    return json.dumps([plan, run["batch"], run["machine"], settings])


def _pool(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    seeds = [run["plan"]["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {seeds} of one evaluation: the same questions would count twice")
    settings = []
    for same in zip(*(run["settings"] for run in runs), strict=True):
        cells = [pool_cells(cells) for cells in zip(*(s["cells"] for s in same), strict=True)]
        seconds = round(sum(setting["seconds"] for setting in same), 1)
        settings.append({**same[0], "seconds": seconds, "cells": cells})
    return {
        **runs[-1],
        "date": max(run["date"] for run in runs),
        "plan": {**runs[0]["plan"], "seed": seeds},
        "settings": settings,
    }


def pool_cells(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cells of one question to one setting as one: counts of all, their interval, means."""
    exact, samples = (sum(cell[key] for cell in cells) for key in ("exact", "samples"))
    low, high = wilson(exact, samples)
    means = {
        key: sum(cell[key] * cell["samples"] for cell in cells) / samples
        for key in ("match", "share", "rate")
    }
    return {**cells[0], "samples": samples, "exact": exact, "low": low, "high": high, **means}
