"""The table of the README: each model that ships beside its base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.site.summaries import BASE, MIB, SHIPPED, of_both, table

Runs = Callable[[str], list[dict[str, Any]]]

# Summaries of questions of which no choice was made, of each model that ships.
DEMO = ("recall-tasks", "recall-parts", "remade-recall")
MODELS = {"SmolLM2-135M": DEMO, "Qwen2.5-Coder-0.5B": ("second-recall",)}
LENGTH = 4096
TASKS = {
    "niah-1": "a number in noise",
    "niah-2": "a number in prose",
    "multikey": "one number of four",
    "multivalue": "four numbers of one key",
    "niah-3": "a UUID in prose",
}
KINDS = {BASE: "{}, full KV cache", SHIPPED: "**{} as LoLA**"}


def readme(runs: Runs) -> str:
    """Bytes of a sequence, and exact answers to the questions that model and base were asked."""
    lines = [["", "MiB per sequence", *TASKS.values()]]
    for model, names in MODELS.items():
        several = [run for name in names for run in runs(name)]
        found = of_both(several, tuple(KINDS))
        for name, label in KINDS.items():
            cells = [found[name][task, LENGTH] for task in TASKS]
            counts = [f"{cell['exact']} of {cell['samples']}" for cell in cells]
            lines.append([label.format(model), _mib(several, name), *counts])
    return table(lines)


def _mib(runs: list[dict[str, Any]], name: str) -> str:
    """Of a sequence of `LENGTH` tokens."""
    (size,) = {
        row["state_bytes"] or LENGTH * row["full_kv_bytes_per_token"]
        for run in runs
        for row in run["settings"]
        if row["name"] == name
    }
    return f"{size / MIB:.3g}"


TABLES: dict[str, Callable[[Runs], str]] = {"readme-recall": readme}
