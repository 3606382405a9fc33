"""Pictures of recall: over length, over depth and length, over bytes per sequence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lola_vllm.eval.results import MIB, Record
from lola_vllm.eval.summary import DEPTH_BINS, depth_bin, recall_cell, recall_cells

DOTS_PER_INCH = 150


def plot_recall(records: list[Record], out: Path) -> list[Path]:
    """Write every picture that the records allow.

    Args:
        records: of a recall evaluation, with samples. out: an existing directory.

    Returns:
        The files written: per task one over length, one over bytes if the sizes of at least two
        settings are known, and one per setting over depth and length.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    tasks = list(dict.fromkeys(row["task"] for record in records for row in record.samples))
    written = []
    for task in tasks:
        written.append(_save(out / f"recall-length-{task}.png", _over_length, records, task))
        if sum(record.memory is not None for record in records) > 1:
            written.append(_save(out / f"recall-bytes-{task}.png", _over_bytes, records, task))
        for record in records:
            name = re.sub(r"[^\w.-]+", "-", record.setting.name)
            path = out / f"recall-depth-{task}-{name}.png"
            written.append(_save(path, _over_depth, [record], task))
    return written


def _save(path: Path, draw: Callable[[Any, list[Record], str], None], *what: Any) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    draw(axes, *what)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    pyplot.close(figure)
    return path


def _over_length(axes: Any, records: list[Record], task: str) -> None:
    lengths: set[int] = set()
    for i, record in enumerate(records):
        cells = {n: c for (name, n), c in recall_cells(record.samples).items() if name == task}
        if not cells:
            continue
        lengths |= set(cells)
        rates = np.array([cell.rate for cell in cells.values()])
        errors = [
            rates - [cell.low for cell in cells.values()],
            [cell.high for cell in cells.values()] - rates,
        ]
        # Rounding may leave an error bar of -1e-17, which matplotlib refuses.
        bars = np.clip(errors, 0, None)
        # Side by side, or equal settings would hide each other.
        places = np.array(list(cells)) * 2 ** (0.04 * (i - (len(records) - 1) / 2))
        name = record.setting.name
        axes.errorbar(places, rates, yerr=bars, marker="osD^v<>"[i % 7], capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), [f"{length:,}" for length in sorted(lengths)])
    axes.set_xlabel("prompt and answer, tokens")
    _finish(axes, f"{task}: exact answers over length, 95 % intervals")


def _over_bytes(axes: Any, records: list[Record], task: str) -> None:
    lengths = sorted({n for r in records for name, n in recall_cells(r.samples) if name == task})
    named: set[str] = set()
    for i, length in enumerate(lengths):
        points = []
        for record in records:
            cell = recall_cells(record.samples).get((task, length))
            if cell is None or record.memory is None:
                continue
            size, name = record.memory.bytes_at(length) / MIB, record.setting.name
            if record.memory.state_bytes is None:
                axes.plot(size, cell.rate, marker="s", color=f"C{i}", fillstyle="none")
            else:
                points.append((size, cell.rate))
            if name not in named:  # LoLA's size is the same at every length
                named.add(name)
                place = {"xytext": (3, 5), "textcoords": "offset points"}
                axes.annotate(name, (size, cell.rate), fontsize=7, **place)
        points.sort()
        sizes, rates = [point[0] for point in points], [point[1] for point in points]
        axes.plot(sizes, rates, marker="o", color=f"C{i}", label=f"{length:,} tokens")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("MiB per sequence (squares: softmax attention)")
    _finish(axes, f"{task}: exact answers over memory")


def _over_depth(axes: Any, records: list[Record], task: str) -> None:
    (record,) = records
    samples = [row for row in record.samples if row["task"] == task]
    lengths = sorted({row["length"] for row in samples})
    grid = np.full((DEPTH_BINS, len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        for line in range(DEPTH_BINS):
            found = [
                row
                for row in samples
                if row["length"] == length and depth_bin(row["depth"]) == line
            ]
            if found:
                cell = recall_cell(found)
                grid[line, column] = cell.rate
                axes.text(column, line, f"{cell.exact}/{cell.samples}", ha="center", va="center",
                          color="white" if cell.rate < 0.5 else "black", fontsize=8)  # fmt: skip
    image = axes.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.figure.colorbar(image, label="exact answers")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    edges = [f"{100 * i // DEPTH_BINS}-{100 * (i + 1) // DEPTH_BINS} %" for i in range(DEPTH_BINS)]
    axes.set_yticks(range(DEPTH_BINS), edges)
    axes.set_xlabel("prompt and answer, tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"{task}, {record.setting.name}", fontsize=10)


def _finish(axes: Any, title: str) -> None:
    axes.set_ylim(-0.03, 1.06)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("exact answers")
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
