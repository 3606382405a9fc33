"""The tables on the pages: of results, from benchmarks/results/, and of the parameters.

    python -m tools.site.result_tables            # after a change of a summary or a parameter
    python -m tools.site.result_tables recall-copy eval-results/copy-7000/copy.summary.json

The second form makes a table's file of one or several summaries first: what `lola-vllm eval` and
the programs of benchmarks/ and tools/ write. Recall that was asked with several seeds counts
together. A page has a table between two comments, the first of which names it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lola_vllm.evaluation import summary
from lola_vllm.evaluation.results import wilson
from tools.site import config_table, copy_tables, front_tables, speed_tables
from tools.site.summaries import (
    BASE,
    RESULTS,
    ROOT,
    SHIPPED,
    Cells,
    asked,
    of_both,
    table,
    together,
)

BEGIN = "<!-- {}, made by python -m tools.site.result_tables -->\n"
END = "<!-- end -->\n"
MARK = re.compile(BEGIN.format("([a-z-]+)").replace(".", r"\.") + "(.*?)" + END, re.S)
PAGES = (
    "README.md",
    "docs/recall.md",
    "docs/linearize.md",
    "docs/performance.md",
    "docs/configuration.md",
)

ROWS = {
    BASE: "softmax base, full KV cache",
    SHIPPED: "**as it ships, 9.99 MiB**",
}
LENGTHS = (1024, 2048, 4096)
TASKS = {
    "niah-1": "S-NIAH-1, a number in noise",
    "niah-2": "S-NIAH-2, a number in prose",
    "niah-3": "S-NIAH-3, a UUID in prose",
    "multikey": "multikey, one number of four",
}
SEVERAL = {
    "multivalue": "multivalue, four numbers of one key",
    "multiquery": "multiquery, the numbers of four keys",
    "vt": "variable tracking",
}
LORA = "the base with the same LoRA"
SECOND_ROWS = {BASE: ROWS[BASE], SHIPPED: "**as it ships, 9.59 MiB**"}
# Of docs/recall.md: the demo model without its parts.
DEMO_PARTS_ROWS = {
    BASE: ROWS[BASE],
    LORA: LORA,
    SHIPPED: ROWS[SHIPPED],
    "the paper's form": "the paper's form, 233 pairs in every head",
    "hidden state off": "hidden state off",
    "sparse cache off": "sparse cache off",
    "window alone": "window alone",
}
DEMO_PARTS = {"niah-2": TASKS["niah-2"]}


def runs(name: str) -> list[dict[str, Any]]:
    """The summaries that a table is made of."""
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def settings(name: str) -> list[dict[str, Any]]:
    """The settings of all runs of a table; `--reference` is the base."""
    found = [setting for run in runs(name) for setting in run["settings"]]
    return [{**row, "name": BASE if row["name"] == "reference" else row["name"]} for row in found]


# --- recall


def cells(name: str, setting: str) -> Cells:
    """A setting's cells by task and length, or by task and distance where they have one.

    Runs that asked the same with other seeds count together.
    """
    return together(asked(runs(name), setting))


def share(cell: dict[str, Any] | None, usual: int) -> str:
    """Exact answers in percent, their number where it is not the usual one; empty for None.

    RULER's score follows where an answer has several strings, of which it may have some.
    """
    if cell is None:
        return ""
    low, high = (round(100 * bound) for bound in wilson(cell["exact"], cell["samples"]))
    text = f"{100 * cell['exact'] / cell['samples']:.0f} %"
    text += f" [{low}, {high}]" if low else f" [0, {high}]"
    if cell["samples"] != usual:
        text += f" of {cell['samples']}"
    return f"{text}, {100 * cell['match']:.0f} %" if cell.get("task") in SEVERAL else text


def by_task(
    name: str, tasks: dict[str, str], lengths: tuple[int, ...], rows: dict[str, str], usual: int
) -> str:
    """Settings below each task, lengths beside each other."""
    found = {label: cells(name, setting) for setting, label in rows.items()}
    return below(found, tasks, lengths, usual)


def below(
    found: dict[str, Cells], tasks: dict[str, str], lengths: tuple[int, ...], usual: int
) -> str:
    """Rows by their labels below each task, lengths beside each other."""
    lines = [["", "", *(f"{n:,} tokens" if n == lengths[0] else f"{n:,}" for n in lengths)]]
    for task, title in tasks.items():
        for label, of_row in found.items():
            shown = [share(of_row.get((task, n)), usual) for n in lengths]
            if any(shown):
                lines.append([title, label, *shown])
                title = ""
    return table(lines)


def second() -> str:
    """The second model, its base, and other methods with it (`benchmarks/peers.py`)."""
    found = {label: cells("second-recall", name) for name, label in SECOND_ROWS.items()}
    others = dict.fromkeys(setting["name"] for setting in settings("peers"))
    found |= {f"{name}, 9.59 MiB": cells("peers", name) for name in others}
    return below(found, {"niah-3": TASKS["niah-3"], **SEVERAL}, (4096, 8192), 9)


def demo() -> str:
    """The demo model and its base: what both were asked."""
    both = of_both([run for name in front_tables.DEMO for run in runs(name)], tuple(ROWS))
    return below({label: both[name] for name, label in ROWS.items()}, TASKS, LENGTHS, 12)


def perplexity() -> str:
    """Perplexity by kind of text, and of all together."""
    by_name = {row["name"]: row["kinds"] for row in settings("recall-perplexity")}
    base, ships = by_name[BASE], by_name[SHIPPED]
    lines = [["text", "base", "as it ships, 9.99 MiB"]]
    for kind, of_base in base.items():
        ratio, low, high = (f"{x:.3f}" for x in ships[kind]["ratio"])
        name = kind if kind == "all" else f"`{kind}`"
        lines.append([name, f"{of_base['perplexity'][0]:.1f}", f"{ratio}x [{low}, {high}]"])
    return table(lines)


def choices() -> str:
    """Decisions, with one number each."""
    lines = [["decision", "measured by", "with it", "without"]]
    for row in runs("choices"):
        both = [value if isinstance(value, str) else share(value, 0) for value in row["found"]]
        lines.append([row["choice"], row["measured_by"], *both])
    return table(lines)


PARTS = (copy_tables, front_tables, speed_tables)
TABLES: dict[str, Callable[[], str]] = {
    "recall-tasks": demo,
    "recall-parts": partial(by_task, "recall-parts", DEMO_PARTS, LENGTHS[1:], DEMO_PARTS_ROWS, 12),
    "recall-perplexity": perplexity,
    "second-recall": second,
    "choices": choices,
    "configuration": config_table.config_table,
    **{name: partial(make, runs) for part in PARTS for name, make in part.TABLES.items()},
}


def with_tables(page: str) -> str:
    """The page with the tables of now."""
    return MARK.sub(lambda found: BEGIN.format(found[1]) + TABLES[found[1]]() + END, page)


def main(argv: list[str]) -> None:
    """Make a table's file if one is named, then the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="of the table whose file is made first")
    parser.add_argument("files", nargs="*", type=Path, help="summaries that it is made of")
    args = parser.parse_args(argv)
    if args.name:
        if not args.files:
            parser.error(f"files: none for {args.name!r}; name the summaries it is made of")
        found = [json.loads(file.read_text()) for file in args.files]
        (RESULTS / f"{args.name}.json").write_text(summary.text(found), encoding="utf-8")
    for name in PAGES:
        page = ROOT / name
        page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
