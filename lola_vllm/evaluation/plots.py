"""Pictures of recall, over length, depth, bytes and distance, of copies and of streams."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from lola_vllm.evaluation.copied import copy_cells_of
from lola_vllm.evaluation.curves import curves_of, distance_cells, lines_of
from lola_vllm.evaluation.results import (
    DEPTH_BINS,
    MIB,
    Cell,
    Record,
    depth_bin,
    recall_cell,
    recall_cells,
)

DOTS_PER_INCH = 150
PANELS_IN_A_ROW = 3


def plot_recall(records: list[Record], out: Path) -> list[Path]:
    """Write every picture that the records allow.

    Args:
        records: of a recall evaluation, with samples. out: an existing directory.

    Returns:
        The files written: per task recall over length, over depth and length, and over bytes if
        the sizes of at least two settings are known.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    written = []

    def save(figure: Any, name: str) -> None:
        written.append(out / f"recall-{name}.png")
        figure.savefig(written[-1], dpi=DOTS_PER_INCH)

    for task in dict.fromkeys(row["task"] for record in records for row in record.samples):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        _over_length(figure.subplots(), records, task)
        save(figure, f"length-{task}")
        columns = min(PANELS_IN_A_ROW, len(records))
        rows = -(-len(records) // columns)
        figure = Figure(figsize=(1.0 + 3.4 * columns, 0.6 + 2.6 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        image: Any = None
        for axes, record in itertools.zip_longest(panels, records):
            if record is None:
                axes.set_axis_off()
            else:
                image = _over_depth(axes, record, task)
        figure.suptitle(f"{task}: exact answers by depth of the needle", fontsize=10)
        figure.supxlabel("prompt and answer, tokens", fontsize=8)
        figure.colorbar(image, ax=figure.axes, format=lambda value, _: f"{value:.0%}")
        save(figure, f"depth-{task}")
        if sum(record.memory is not None for record in records) > 1:
            figure = Figure(figsize=(6.4, 4.0), layout="constrained")
            _over_bytes(figure.subplots(), records, task)
            save(figure, f"bytes-{task}")
    return written


def _over_length(axes: Any, records: list[Record], task: str) -> None:
    lengths: set[int] = set()
    for i, record in enumerate(records):
        cells = {n: c for (name, n), c in recall_cells(record.samples).items() if name == task}
        lengths |= set(cells)
        _rates(axes, cells, i, len(records), record.setting.name)
    _token_ticks(axes, lengths)
    axes.set_xlabel("prompt and answer, tokens")
    _finish(axes, f"{task}: exact answers over length, 95 % intervals")


def _rates(axes: Any, cells: dict[int, Cell], i: int, lines: int, name: str) -> None:
    """Line `i` of several: shares of exact answers with intervals over a number of tokens."""
    if not cells:
        return
    rates = np.array([cell.rate for cell in cells.values()])
    errors = [
        rates - [cell.low for cell in cells.values()],
        [cell.high for cell in cells.values()] - rates,
    ]
    # Rounding may leave an error bar of -1e-17, which matplotlib refuses.
    bars = np.clip(errors, 0, None)
    # Side by side, because bars of equal settings would hide each other.
    places = np.array(list(cells)) * 2 ** (0.04 * (i - (lines - 1) / 2))
    axes.errorbar(places, rates, yerr=bars, marker="osD^v<>"[i % 7], capsize=3, label=name)


def _token_ticks(axes: Any, tokens: set[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(tokens), [f"{n:,}" for n in sorted(tokens)])


def plot_distances(records: list[Record], out: Path) -> list[Path]:
    """Write a picture per task: exact answers over the distance of the needle.

    Args:
        records: of a recall evaluation with distances. out: an existing directory.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    cells = [distance_cells(record.samples) for record in records]
    keys = [key for found in cells for key in found]
    written = []
    for task in dict.fromkeys(task for task, _, _ in keys):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        lines = [
            (
                record.setting.name,
                length,
                {d: found[task, n, d] for n, d in pairs if (task, n, d) in found},
            )
            for record, found in zip(records, cells, strict=True)
            for length, pairs in lines_of(keys, task).items()
        ]
        for i, (name, length, of_line) in enumerate(lines):
            label = name if length is None else f"{name}, {length:,} tokens"
            _rates(axes, of_line, i, len(lines), label)
        _token_ticks(axes, {distance for name, _, distance in keys if name == task})
        axes.set_xlabel("tokens from needle to question")
        _finish(axes, f"{task}: exact answers over distance, 95 % intervals")
        written.append(out / f"recall-distance-{task}.png")
        figure.savefig(written[-1], dpi=DOTS_PER_INCH)
    return written


def plot_copies(records: list[Record], reference: Record | None, out: Path) -> list[Path]:
    """Write a picture per kind and length: exact tokens over distance, and shares of the gain.

    Args:
        records: of a copy evaluation. reference: one of them, or None. out: an existing directory.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    found = [copy_cells_of(record, reference) for record in records]
    keys = [key for cells in found for key in cells]
    written = []
    for kind, length in dict.fromkeys((kind, length) for kind, length, _ in keys):
        distances = {d for of, n, d in keys if (of, n) == (kind, length)}
        of_kind = [
            {d: cell for (*of, d), cell in cells.items() if of == [kind, length]} for cells in found
        ]
        shares = any(cell.gain for cells in of_kind for cell in cells.values())
        figure = Figure(figsize=(6.4, 6.4 if shares else 4.0), layout="constrained")
        panels = figure.subplots(1 + shares, 1, sharex=True, squeeze=False)[:, 0]
        for i, (record, of_line) in enumerate(zip(records, of_kind, strict=True)):
            place = 0.04 * (i - (len(records) - 1) / 2)
            style = {"marker": "osD^v<>"[i % 7], "color": f"C{i}", "label": record.setting.name}
            for axes, part in zip(panels, ("exact", "gain"), strict=False):
                triples = {d: vars(cell)[part] for d, cell in of_line.items() if vars(cell)[part]}
                _triples(axes, triples, place, style)
            floor = {d: cell.floor_exact for d, cell in of_line.items() if cell.floor_exact}
            name = f"{record.setting.name}, not read"
            _triples(panels[0], floor, place, {**style, "linestyle": ":", "label": name})
        _token_ticks(panels[-1], distances)
        for axes, label in zip(panels, ("exact tokens", "share of the gain"), strict=False):
            axes.set_ylabel(label)
            axes.set_ylim(-0.03, 1.06)
            axes.grid(alpha=0.3)
            if axes.containers:
                axes.legend(fontsize=8)
        panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panels[0].set_title(f"{kind}, {length:,} tokens: passages begun again", fontsize=10)
        panels[-1].set_xlabel("tokens from passage to question")
        written.append(out / f"copy-{kind}-{length}.png")
        figure.savefig(written[-1], dpi=DOTS_PER_INCH)
    return written


def _triples(axes: Any, triples: dict[int, Any], place: float, style: dict[str, Any]) -> None:
    """A line of values with their intervals over numbers of tokens, moved aside by 2^`place`."""
    if not triples:
        return
    values, lows, highs = np.array(list(triples.values())).T
    bars = np.clip([values - lows, highs - values], 0, None)
    axes.errorbar(np.array(list(triples)) * 2**place, values, yerr=bars, capsize=3, **style)


def plot_stream(records: list[Record], reference: Record | None, out: Path) -> list[Path]:
    """Write a picture per kind of text: perplexity over the stream, and times the reference's.

    Args:
        records: of a stream. reference: one of them, or None. out: an existing directory.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    found = [curves_of(record, reference) for record in records]
    written = []
    for kind in dict.fromkeys(kind for by_kind in found for kind in by_kind):
        ratios = any(kind in c and c[kind].others is not None for c in found)
        figure = Figure(figsize=(6.4, 6.4 if ratios else 4.0), layout="constrained")
        panels = figure.subplots(1 + ratios, 1, sharex=True, squeeze=False)[:, 0]
        for i, (record, by_kind) in enumerate(zip(records, found, strict=True)):
            if kind not in by_kind:
                continue
            points = by_kind[kind].points()
            stops = [point.stop for point in points]
            style = {"marker": ".", "color": f"C{i}", "label": record.setting.name}
            panels[0].plot(stops, [point.perplexity for point in points], **style)
            if points[0].ratio is not None:
                panels[1].plot(stops, [point.ratio for point in points], **style)
        for axes, label in zip(panels, ("perplexity", "times the reference's"), strict=False):
            axes.set_yscale("log")
            # Minor ticks are named only where less than a decade is shown.
            axes.yaxis.set_major_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
            axes.set_ylabel(label)
            axes.grid(alpha=0.3, which="both")
            if axes.lines:
                axes.legend(fontsize=8)
        panels[0].set_title(f"{kind}: one stream", fontsize=10)
        panels[-1].set_xlabel("tokens of the stream")
        panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        written.append(out / f"stream-{kind}.png")
        figure.savefig(written[-1], dpi=DOTS_PER_INCH)
    return written


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
            elif record.setting.score != "sre":  # as large as LoLA, so a point beside its line
                axes.plot(size, cell.rate, marker="x", color=f"C{i}")
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
    axes.set_xlabel("MiB per sequence (squares: softmax attention, crosses: ablations)")
    _finish(axes, f"{task}: exact answers over memory")


def _over_depth(axes: Any, record: Record, task: str) -> Any:
    samples = [row for row in record.samples if row["task"] == task]
    lengths = sorted({row["length"] for row in samples})
    grid = np.full((DEPTH_BINS, max(1, len(lengths))), np.nan)
    for column, line in itertools.product(range(len(lengths)), range(DEPTH_BINS)):
        length = lengths[column]
        found = [r for r in samples if r["length"] == length and depth_bin(r["depth"]) == line]
        if found:
            cell = recall_cell(found)
            grid[line, column] = cell.rate
            text = {"ha": "center", "va": "center", "fontsize": 7}
            text["color"] = "white" if cell.rate < 0.5 else "black"
            axes.text(column, line, f"{cell.exact}/{cell.samples}", **text)
    edges = [f"{100 * i // DEPTH_BINS}-{100 * (i + 1) // DEPTH_BINS} %" for i in range(DEPTH_BINS)]
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
    axes.set_yticks(range(DEPTH_BINS), edges, fontsize=7)
    axes.set_title(record.setting.name, fontsize=9)
    return axes.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")


def _finish(axes: Any, title: str) -> None:
    axes.set_ylim(-0.03, 1.06)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("exact answers")
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
