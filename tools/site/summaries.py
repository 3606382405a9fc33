"""What the makers of tables and pictures share: where summaries lie, and Markdown."""

from __future__ import annotations

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
        cell = f"{task} at {length}"
        models = sorted({one.fingerprint for one in several} - {None})
        if len(models) > 1:
            raise ValueError(
                f"{cell}: of the models {', '.join(models)}; leave the summaries of others out"
            )
        seeds = [seed for one in several for seed in one.seeds]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{cell}: seeds {seeds}, so the same questions would count twice")
    return {key: pool_cells([one.cell for one in several]) for key, several in found.items()}


def of_both(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Cells]:
    """Cells of what all settings of these names were asked.

    Questions are the same where task, length, seed and number of samples are: the last decides at
    which depths something is hidden.

    Raises:
        ValueError: as `together`.
    """
    of_each = {name: asked(runs, name) for name in names}

    def is_shared(key: tuple[str, int], one: Asked) -> bool:
        return all(
            any((one.seeds, one.samples) == (it.seeds, it.samples) for it in each.get(key, ()))
            for each in of_each.values()
        )

    found = {}
    for name, cells in of_each.items():
        shared = {key: [x for x in several if is_shared(key, x)] for key, several in cells.items()}
        found[name] = together({key: several for key, several in shared.items() if several})
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the header."""
    head, *rest = (re.sub(r"(?<=\|) +(?=\|)", " ", f"| {' | '.join(row)} |") for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest]) + "\n"


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
