"""Tables of passages that are begun again, and of conversations: docs/recall.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.site.summaries import table

Runs = Callable[[str], list[dict[str, Any]]]
Cells = dict[tuple[str, int, int], dict[str, Any]]

NAME = "recall-copy"
REFERENCE, SHIPPED = "reference", "as it ships"
PROSE, ALL = "prose", "all"


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


def exact(cell: dict[str, Any] | None, part: str = "") -> str:
    """Exact tokens, and the mean log-probability of a token; empty for None."""
    if cell is None:
        return ""
    return f"{percent(cell[part + 'exact'][0])} ({cell[part + 'logprob'][0]:.2f})"


def gain(cell: dict[str, Any] | None) -> str:
    """Share of the base's gain with its interval over texts, which one text has not; empty for None
    and where there is none."""
    if cell is None or cell["gain"] is None:
        return ""
    value, low, high = cell["gain"]
    if low == high:
        return f"{value:.2f}"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def columns(distances: list[int]) -> list[str]:
    """Their names."""
    first, *others = distances
    return [f"{first:,} tokens back", *(f"{distance:,}" for distance in others)]


def prose(runs: Runs) -> str:
    """Base, LoLA, floor and share of the gain in prose, by length of text."""
    base, lola = (cells(runs, name) for name in (REFERENCE, SHIPPED))
    distances = sorted({distance for kind, _, distance in lola if kind == PROSE})
    lines = [["text", "", *columns(distances)]]
    for length in sorted({length for kind, length, _ in lola if kind == PROSE}):
        keys = [(PROSE, length, distance) for distance in distances]
        rows = {
            "softmax base": [exact(base.get(key)) for key in keys],
            "**as it ships**": [exact(lola.get(key)) for key in keys],
            "floor, not read": [exact(base.get(key), "floor_") for key in keys],
            "**share of the base's gain**": [gain(lola.get(key)) for key in keys],
        }
        for label, shown in rows.items():
            if not any(shown):
                continue
            title = f"{length:,} tokens" if label == next(iter(rows)) else ""
            lines.append([title, label, *shown])
    return table(lines)


def kinds(runs: Runs) -> str:
    """Share of the base's gain by kind and length of other texts than prose."""
    found = cells(runs, SHIPPED)
    keys = sorted(key for key, cell in found.items() if gain(cell) and key[0] not in (ALL, PROSE))
    distances = sorted({distance for _, _, distance in keys})
    lines = [["text", "tokens", *columns(distances)]]
    for kind, length in dict.fromkeys(key[:2] for key in keys):
        shown = [gain(found.get((kind, length, distance))) for distance in distances]
        lines.append([kind, f"{length:,}", *shown])
    return table(lines)


CHAT = "recall-chat"
# Task -> what a user said.
TASKS = {
    "chat-fact": "about themselves",
    "chat-name": "about somebody by name",
    "chat-instruction": "how to do something from now on",
    "chat-code": "a block of code",
}
CHAT_SETTINGS = {"reference": "softmax base", "as it ships": "**as it ships**"}


def said(runs: Runs) -> str:
    """Exact answers by task, length of the conversation and tokens since it was said."""
    found = {
        (row["name"], cell["task"], cell["length"], cell["distance"]): cell
        for run in runs(CHAT)
        for row in run["settings"]
        for cell in row["cells"]
    }
    distances = sorted({key[3] for key in found})
    head = ["what was said", "conversation", "", *(f"{x:,} back" for x in distances)]
    lines = [head]
    for task, what in TASKS.items():
        for length in sorted({key[2] for key in found}):
            for name, label in CHAT_SETTINGS.items():
                cells = [found.get((name, task, length, x)) for x in distances]
                if any(cells):  # a base takes no conversation beyond its trained length
                    shown = ["" if x is None else f"{x['exact']} of {x['samples']}" for x in cells]
                    lines.append([what, f"{length:,} tokens", label, *shown])
                    what = ""
    return table(lines)


TABLES: dict[str, Callable[[Runs], str]] = {
    NAME: prose,
    f"{NAME}-kinds": kinds,
    CHAT: said,
}
