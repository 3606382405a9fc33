"""The table of what was said in a conversation: docs/recall.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.site.summaries import table

Runs = Callable[[str], list[dict[str, Any]]]

NAME = "recall-chat"
# Task -> what a user said.
TASKS = {
    "chat-fact": "about themselves",
    "chat-name": "about somebody by name",
    "chat-instruction": "how to do something from now on",
    "chat-code": "a block of code",
}
SETTINGS = {"reference": "softmax base", "as it ships": "**as it ships**"}


def said(runs: Runs) -> str:
    """Exact answers by task, length of the conversation and tokens since it was said."""
    found = {
        (row["name"], cell["task"], cell["length"], cell["distance"]): cell
        for run in runs(NAME)
        for row in run["settings"]
        for cell in row["cells"]
    }
    distances = sorted({key[3] for key in found})
    head = ["what was said", "conversation", "", *(f"{x:,} back" for x in distances)]
    lines = [head]
    for task, what in TASKS.items():
        for length in sorted({key[2] for key in found}):
            for name, label in SETTINGS.items():
                cells = [found.get((name, task, length, x)) for x in distances]
                if any(cells):  # a base takes no conversation beyond its trained length
                    shown = ["" if x is None else f"{x['exact']} of {x['samples']}" for x in cells]
                    lines.append([what, f"{length:,} tokens", label, *shown])
                    what = ""
    return table(lines)


TABLES: dict[str, Callable[[Runs], str]] = {NAME: said}
