"""Tables of stored states: docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.site.summaries import table

Runs = Callable[[str], list[dict[str, Any]]]

# Part and name of a value in the results -> its label and how it is shown.
MANY = {
    ("kill", "sessions before"): ("conversations", "{:,.0f}"),
    ("start", "files"): ("files", "{:,.0f}"),
    ("turns", "bytes on disk, GiB"): ("GiB on the disk", "{:.1f}"),
    ("turns", "turns"): ("turns of random ones", "{:,.0f}"),
    ("turns", "tokens computed over new, most"): (
        "tokens computed over new ones, the most of all turns",
        "{:.2f}",
    ),
    ("turns", "restoring and one token, p50 ms"): ("restoring and one token, p50, ms", "{:.0f}"),
    ("turns", "restoring and one token, p99 ms"): ("p99", "{:.0f}"),
    ("turns", "first token, p50 ms"): ("first token of a turn of 60 tokens, p50, ms", "{:.0f}"),
    ("turns", "first token, p99 ms"): ("p99", "{:.0f}"),
    ("turns", "memory after the first tenth, MiB"): (
        "memory of all processes after a tenth of the turns, MiB",
        "{:,.0f}",
    ),
    ("turns", "memory at last, MiB"): ("after all", "{:,.0f}"),
    ("start", "with no file, s"): ("start without files, s", "{:.1f}"),
    ("start", "with all files, s"): ("start with all", "{:.1f}"),
    ("kill", "sessions lost"): ("conversations missing after `kill -9` in a turn", "{:.0f}"),
    ("kill", "sessions behind, but for the one that was killed"): (
        "behind what was answered",
        "{:.0f}",
    ),
    ("budget", "budget, GiB"): ("start with a budget of half, GiB", "{:.1f}"),
    ("budget", "bytes on disk, GiB"): ("on the disk after it", "{:.1f}"),
    ("budget", "sessions left"): ("conversations left", "{:,.0f}"),
    ("stock vLLM", "tokens computed over new, mean"): (
        "stock vLLM: tokens computed over new ones, mean",
        "{:.0f}",
    ),
    ("stock vLLM", "first token, p50 ms"): (
        "stock vLLM: first token of the same turn, p50, ms",
        "{:,.0f}",
    ),
}


def many_sessions(runs: Runs) -> str:
    """Thousands of conversations on one machine."""
    results = runs("many-sessions")[0]["results"]
    lines = [["", ""]]
    for (part, name), (label, form) in MANY.items():
        if part in results:  # stock vLLM only where it was asked for
            lines.append([label, form.format(results[part][name])])
    return table(lines)


def state_encryption(runs: Runs) -> str:
    """What encrypted files cost."""
    results = runs("state-encryption")[0]["results"]
    plain, sealed = results["plain"], results["encrypted"]
    labels = {
        "a turn, ms": "a turn of 60 tokens that reads its file, to the first token",
        "write a file, ms": "writing a file",
        "read a file, ms": "reading a file",
        "header a file, ms": "reading a header",
    }
    lines = [["ms", "plain", "encrypted", "ratio"]]
    for name, label in labels.items():
        form = "{:.0f}" if plain[name] >= 100 else "{:.1f}" if plain[name] >= 1 else "{:.2f}"
        ratio = f"{sealed[name] / plain[name]:.2f}"
        lines.append([label, form.format(plain[name]), form.format(sealed[name]), ratio])
    return table(lines)


TABLES = {"many-sessions": many_sessions, "state-encryption": state_encryption}
