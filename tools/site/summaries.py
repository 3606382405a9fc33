"""What the makers of tables and pictures share: where summaries lie, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the header."""
    head, *rest = (re.sub(r"(?<=\|) +(?=\|)", " ", f"| {' | '.join(row)} |") for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest]) + "\n"
