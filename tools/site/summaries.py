"""What the makers of tables and pictures share: where summaries lie, and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lola_vllm.evaluation.results import wilson

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20

BASE, SHIPPED = "softmax base", "as it ships"
# By task and length, or by task and distance where a cell has one.
Cells = dict[tuple[str, int], dict[str, Any]]


class Asked(NamedTuple):
    """A cell of one run, and what tells its questions and its model from others.

    Attributes:
        fingerprint: of the model, None where a server was asked.
        seeds: of the questions; each has `samples` of them. samples: of each seed.
        cell: what was found.
    """

    fingerprint: str | None
    seeds: tuple[int, ...]
    samples: int
    cell: Mapping[str, Any]


def asked(runs: Iterable[Mapping[str, Any]], name: str) -> dict[tuple[str, int], list[Asked]]:
    """What runs of `lola-vllm eval recall` asked a setting; `--reference` is the base."""
    found: dict[tuple[str, int], list[Asked]] = {}
    for run in runs:
        plan = run["plan"]
        seeds = tuple(plan["seed"]) if isinstance(plan["seed"], list) else (plan["seed"],)
        for setting in run["settings"]:
            if name != (BASE if setting["name"] == "reference" else setting["name"]):
                continue
            for cell in setting["cells"]:
                key = cell["task"], cell.get("distance", cell["length"])
                one = Asked(setting["fingerprint"], seeds, plan["samples"], cell)
                found.setdefault(key, []).append(one)
    return found


def together(found: Mapping[tuple[str, int], Sequence[Asked]]) -> Cells:
    """The cells of several runs as one of each task and length.

    Raises:
        ValueError: a seed counts twice, or they are of several models.
    """
    for (task, length), several in found.items():
        same_model([one.fingerprint for one in several], f"{task} at {length}")
        _refuse_twice([seed for one in several for seed in one.seeds], f"{task} at {length}")
    return {key: pool_cells([one.cell for one in several]) for key, several in found.items()}


def of_both(
    runs: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[dict[str, Cells], dict[str, Cells]]:
    """Cells of what all settings of these names were asked, and of what one alone was asked.

    Questions are the same where task, length, seed and number of samples are: the last decides at
    which depths something is hidden.

    Raises:
        ValueError: as `together`.
    """
    of_each = {name: asked(runs, name) for name in names}

    def cells(name: str, shared: bool) -> Cells:
        def is_shared(key: tuple[str, int], one: Asked) -> bool:
            return all(
                any((one.seeds, one.samples) == (it.seeds, it.samples) for it in each.get(key, ()))
                for each in of_each.values()
            )

        chosen = {
            key: [one for one in several if is_shared(key, one) == shared]
            for key, several in of_each[name].items()
        }
        return together({key: several for key, several in chosen.items() if several})

    return (
        {name: cells(name, True) for name in names},
        {name: cells(name, False) for name in names},
    )


def same_model(fingerprints: Iterable[str | None], what: str) -> None:
    """Refuse to count results of several models together; a model without a fingerprint passes.

    Raises:
        ValueError: there are several fingerprints.
    """
    known = sorted({one for one in fingerprints if one is not None})
    if len(known) > 1:
        raise ValueError(
            f"{what}: of the models {', '.join(known)}; leave the summaries of other models out"
        )


def _refuse_twice(seeds: Sequence[int], what: str) -> None:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{what}: seeds {seeds}, so the same questions would count twice")


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
    _refuse_twice(seeds, "one evaluation")
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
        if key in cells[0]  # earlier results have shares
    }
    return {**cells[0], "samples": samples, "exact": exact, "low": low, "high": high, **means}
