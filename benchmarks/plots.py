"""The pictures of docs/performance.md, from the summaries in benchmarks/results/.

    python benchmarks/plots.py

Needs matplotlib, which the extra `distill` brings.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from common import ROOT
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

RESULTS = ROOT / "benchmarks/results"
IMAGES = ROOT / "docs/images"
STYLES = {"stock": "--", "lola": "-"}
NAMES = {"stock": "stock vLLM", "lola": "LoLA"}


def read(name: str) -> list[Any]:
    """The results of each run of one file."""
    return [run["results"] for run in json.loads((RESULTS / name).read_text())]


def finish(axes: Axes, ticks: list[int], title: str) -> None:
    """What both pictures look like: a tick per measured value, a grid, a title."""
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)


def decode_picture() -> None:
    """Tokens per second over the context, a line per engine and batch."""
    lines: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for results in read("engine.json")[:1]:
        for engine, cells in results.items():
            for key, value in cells.items():
                if key.startswith("decode_tokens_per_s/"):
                    _, context, batch = key.split("/")
                    lines[engine, int(batch)][int(context)] = value
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    colors = {b: f"C{i}" for i, b in enumerate(sorted({batch for _, batch in lines}))}
    for (engine, batch), points in sorted(lines.items()):
        contexts = sorted(points)
        axes.plot(
            contexts,
            [points[n] for n in contexts],
            STYLES[engine],
            color=colors[batch],
            marker="o",
            markersize=3,
            label=f"{NAMES[engine]}, batch {batch}",
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="tokens per second")
    contexts = sorted({n for points in lines.values() for n in points})
    finish(axes, contexts, "Decode, SmolLM2-135M, 2 CPU cores")
    speeds = [30, 50, 100, 200, 400, 800]
    axes.set_yticks(speeds, [str(n) for n in speeds])
    axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(IMAGES / "decode.png", dpi=130)


def bandwidth_picture() -> None:
    """Bandwidth of the op over the batch, a line per sparse cache size, beside a plain read."""
    lines: dict[int, dict[int, float]] = defaultdict(dict)
    ceiling: dict[int, list[float]] = defaultdict(list)
    for row in read("ops.json")[0]:
        if row["interval"] == 64:
            lines[row["lam"]][row["batch"]] = row["gb_per_s"]
            ceiling[row["batch"]].append(row["read_gb_per_s"])
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for lam, points in sorted(lines.items()):
        batches = sorted(points)
        axes.plot(batches, [points[b] for b in batches], marker="o", label=f"decode, lam {lam}")
    batches = sorted(ceiling)
    means = [sum(ceiling[b]) / len(ceiling[b]) for b in batches]
    axes.plot(batches, means, "k:", label="reading a large buffer")
    axes.set(xscale="log", xlabel="batch", ylabel="GB/s", ylim=(0, None))
    finish(axes, batches, "One layer's decode op beside the memory bus, 2 CPU cores")
    axes.legend(fontsize=8)
    figure.savefig(IMAGES / "bandwidth.png", dpi=130)


def main() -> None:
    """Draw both."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    decode_picture()
    bandwidth_picture()


if __name__ == "__main__":
    main()
