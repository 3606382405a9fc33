"""Tables of libraries: docs/library.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.site.summaries import same_model, table

Runs = Callable[[str], list[dict[str, Any]]]

STOCK = "bm25 and stock"
KINDS = {"needles": "a number", "facts": "a fact"}
FOUND = {
    "first": "the model's own heads, first",
    "among three": "the model's own heads, among three",
    "bm25 first": "BM25 by the whole prompt, first",
    "bm25 among three": "BM25 by the whole prompt, among three",
    "bm25 alone first": "BM25 by the question alone, first",
    "bm25 alone among three": "BM25 by the question alone, among three",
    "both first": "heads and words together, first",
    "both among three": "heads and words together, among three",
    "embedding first": "a sentence model, first",
    "embedding among three": "a sentence model, among three",
}
EXACT = {
    "alone": "the right document alone",
    "of 1": "the first that was found",
    "of 3": "the first three, composed",
    STOCK: "stock model, reading the three that BM25 finds",
}
SECONDS = {
    "read one": "reading a document of 2,000 tokens, once",
    "embed one": "a sentence model's vectors of a document, once",
    "question": "the question's queries, read behind a document",
    "choose of 8": "choosing among 8 documents",
    "choose of 32": "choosing among 32",
    "choose of 128": "choosing among 128",
    "choose of 1000": "choosing among 1,000",
    "first token alone": "first token of the document alone, whose state is at hand",
    "first token of 1": "first token of the first that was found, with choosing and loading",
    "first token of 3": "first token of three, with choosing, loading and composing",
    f"first token {STOCK}": "first token of the stock model, reading three documents",
}


def _results(runs: Runs, name: str) -> list[dict[str, float]]:
    """What the runs of a summary found, which count together.

    Raises:
        ValueError: they are of several models.
    """
    found = runs(name)
    for role in {role for run in found for role in run.get("models", {})}:
        same_model([run.get("models", {}).get(role) for run in found], f"{name}, --{role}")
    return [run["results"] for run in found]


def _sum(results: list[dict[str, float]], name: str) -> int:
    return round(sum(found.get(name, 0) for found in results))


def _right(results: list[dict[str, float]], name: str, of: str) -> str:
    """How many were right, of so many in those results that say it; empty where none does."""
    asked = [one for one in results if name in one]
    return f"{_sum(asked, name)} of {_sum(asked, of)}" if asked else ""


def found(runs: Runs) -> str:
    """Questions whose document is found, by the size of the shelf; all seeds together."""
    results = _results(runs, "library")
    sizes = sorted(
        {int(name.rsplit(" ", 1)[1]) for one in results for name in one if " first of " in name}
    )
    lines = [["asked for", "found by", *(f"of {size:,} documents" for size in sizes)]]
    for kind, label in KINDS.items():
        for how, by in FOUND.items():
            cells = [
                _right(results, f"{kind} {how} of {size}", f"{kind} questions") for size in sizes
            ]
            if not any(cells):
                continue
            lines.append([label, by, *cells])
            label = ""
    return table(lines)


def _with_stock(runs: Runs) -> list[dict[str, float]]:
    """The results, and of the runs that asked the same of a stock model what it says of that."""
    of_stock = (
        {name: value for name, value in one.items() if _is_of_stock(name)}
        for one in _results(runs, "library-stock")
    )
    return [*_results(runs, "library"), *of_stock]


def _is_of_stock(name: str) -> bool:
    return STOCK in name or name in (f"{kind} asked" for kind in KINDS)


def exact(runs: Runs) -> str:
    """Exact answers."""
    results = _with_stock(runs)
    lines = [["made of", *KINDS.values()]]
    for how, label in EXACT.items():
        cells = [_right(results, f"{kind} exact {how}", f"{kind} asked") for kind in KINDS]
        if any(cells):
            lines.append([label, *cells])
    return table(lines)


def seconds(runs: Runs) -> str:
    """Seconds of one core, and bytes."""
    results = _with_stock(runs)
    lines = [["", "seconds of one core"]]
    for name, label in SECONDS.items():
        values = [one[f"{name} s"] for one in results if f"{name} s" in one]
        if values:
            lines.append([label, f"{sum(values) / len(values):.2f}"])
    both = [[one.get(f"first token {of} s") for of in ("of 1", "alone")] for one in results]
    ratios = [found / alone for found, alone in both if found and alone]
    mean = sum(ratios) / len(ratios)
    lines.append(["the first that was found, times the document alone", f"{mean:.1f}"])
    return table(lines)


TABLES = {
    "library-found": found, "library-exact": exact, "library-seconds": seconds,
}  # fmt: skip
