"""Summaries of results: what tables are made of, without single answers, in few lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

LINE = 320  # characters; a longer list or mapping has an entry a line, unless all are numbers
DIGITS = 9  # significant ones


def summarize(report: Mapping[str, Any], made_by: str) -> dict[str, Any]:
    """A report's counts, intervals and settings, with today's date.

    Left out are answers, windows and blocks (`samples` of a setting, `asked`).

    Args:
        report: of `Comparison`, or of a program in benchmarks/ or tools/. made_by: its name.
    """
    kept = {key: value for key, value in report.items() if key != "asked"}
    if isinstance(kept.get("settings"), list):
        kept["settings"] = [
            {key: value for key, value in setting.items() if key != "samples"}
            for setting in kept["settings"]
        ]
    return {"made_by": made_by, "date": date.today().isoformat(), **kept}


def text(value: Any) -> str:
    """JSON with a line for each row of a table, and numbers of `DIGITS` digits."""
    return _lines(_rounded(value), 0) + "\n"


def write(path: Path, report: Mapping[str, Any], made_by: str) -> None:
    """Write `summarize(report)`; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(summarize(report, made_by)), encoding="utf-8")


def _lines(value: Any, indent: int) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if not value or not isinstance(value, dict | list) or len(line) <= LINE or _flat(value):
        return line
    inner = indent + 1
    if isinstance(value, dict):
        rows = [f"{json.dumps(key)}: {_lines(v, inner)}" for key, v in value.items()]
        brackets = "{}"
    else:
        rows, brackets = [_lines(v, inner) for v in value], "[]"
    body = ",\n".join(" " * inner + row for row in rows)
    return f"{brackets[0]}\n{body}\n{' ' * indent}{brackets[1]}"


def _flat(value: Any) -> bool:
    """Whether a list holds numbers alone, at any depth, or a mapping single values and such."""
    if isinstance(value, dict):
        return all(not isinstance(v, dict) and _flat(v) for v in value.values())
    if isinstance(value, list):
        return all(isinstance(v, int | float | list) and _flat(v) for v in value)
    return True


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
