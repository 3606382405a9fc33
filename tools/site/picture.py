"""The picture of the front page: memory over context, with recall, in docs/images/memory-*.svg.

    python -m tools.site.picture

The numbers are those of benchmarks/results/memory-picture.json: bytes as `lola-vllm estimate`
computes them, and the share of exact answers to RULER's S-NIAH-1. SVG is written for a light and a
dark page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "benchmarks" / "results" / "memory-picture.json"
IMAGES = ROOT / "docs" / "images"
TASK = "niah-1"

WIDTH, HEIGHT = 540, 394  # at the width of a phone the letters can still be read
LEFT, RIGHT, TOP, BOTTOM = 46, 4, 64, 340  # of the plot
LENGTHS = (1024, 2048, 4096, 8192)
MIB = (4, 8, 16, 32, 64, 128, 256)

COLORS = {
    "light": {"text": "#1f2328", "faint": "#59636e", "grid": "#d1d9e0", "stock": "#b35900",
              "lola": "#0550ae"},
    "dark": {"text": "#f0f6fc", "faint": "#9198a1", "grid": "#3d444d", "stock": "#f0883e",
             "lola": "#79c0ff"},
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A setting: MiB and the share of exact answers by length in tokens.

    `labels`: how far below its dot each share stands, and how far right of and below the last dot
    the name ends.
    """

    name: str
    color: str
    labels: tuple[int, int, int]
    mib: dict[int, float]
    recall: dict[int, float]


# Name, colour, places of labels, the setting's name in the runs.
SETTINGS = (
    ("full KV cache", "stock", (-10, -36, 0), "softmax teacher"),
    ("LoLA", "lola", (20, 32, -12), "as it ships"),
)


def lines() -> list[Line]:
    """What is drawn, from the results."""
    settings = [setting for run in json.loads(RUNS.read_text()) for setting in run["settings"]]
    return [_line(*row, settings=settings) for row in SETTINGS]


def _line(
    name: str,
    color: str,
    labels: tuple[int, int, int],
    setting: str,
    settings: list[dict[str, Any]],
) -> Line:
    mib: dict[int, float] = {}
    recall: dict[int, float] = {}
    for found in settings:
        if found["name"] != setting:
            continue
        for cell in found["cells"]:
            if cell["task"] == TASK:
                recall[cell["length"]] = cell["rate"]
        for length in LENGTHS:  # a state has one size, a full KV cache one per token
            size = found["state_bytes"] or length * found["full_kv_bytes_per_token"]
            mib[length] = size / 2**20
    return Line(name, color, labels, mib, recall)


def _x(length: float) -> float:
    share = math.log2(length / LENGTHS[0]) / math.log2(LENGTHS[-1] / LENGTHS[0])
    return LEFT + 32 + share * (WIDTH - RIGHT - LEFT - 64)


def _y(mib: float) -> float:
    return BOTTOM - math.log2(mib / MIB[0]) / math.log2(MIB[-1] / MIB[0]) * (BOTTOM - TOP)


def svg(theme: str) -> str:
    """The picture for a "light" or a "dark" page."""
    return "\n".join(_elements(COLORS[theme])) + "\n"


def _elements(color: dict[str, str]) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" font-family="system-ui, sans-serif" font-size="15" '
        f'fill="{color["text"]}">'
    )
    yield "<title>Memory over context, and how often a hidden number is found</title>"
    yield text(LEFT, 20, "Memory of one sequence, MiB (logarithmic)", weight="600")
    yield text(LEFT, 42, "at each dot: hidden numbers found (RULER S-NIAH-1)", fill=color["faint"])
    for mib in MIB:
        y = _y(mib)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{color["grid"]}"/>'
        yield text(LEFT - 8, y + 5, str(mib), anchor="end", fill=color["faint"])
    for length in LENGTHS:
        yield text(_x(length), BOTTOM + 22, f"{length:,}", anchor="middle", fill=color["faint"])
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield text(middle, BOTTOM + 46, "tokens of context", anchor="middle", fill=color["faint"])
    for line in lines():
        yield from _line_elements(line, color[line.color])
    yield "</svg>"


def _line_elements(line: Line, stroke: str) -> Iterator[str]:
    """A line with its shares and its name, where the other lines leave room."""
    points = " ".join(f"{_x(n):.1f},{_y(line.mib[n]):.1f}" for n in LENGTHS)
    yield f'<polyline points="{points}" fill="none" stroke="{stroke}" stroke-width="2.5"/>'
    share_below, name_right, name_below = line.labels
    for length, share in sorted(line.recall.items()):
        x, y = _x(length), _y(line.mib[length])
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{stroke}"/>'
        words = f"{share:.0%}".replace("%", " %")
        yield text(x, y + share_below, words, anchor="middle", fill=stroke)
    last = LENGTHS[-1]
    name = f"{line.name}: {line.mib[last]:.1f} MiB at {last:,}"
    x, y = _x(last) + name_right, _y(line.mib[last]) + name_below
    yield text(x, y, name, anchor="end", weight="600", fill=stroke)


def text(x: float, y: float, words: str, **how: str) -> str:
    """An element of SVG; `how`: its anchor, weight and fill."""
    names = {"anchor": "text-anchor", "weight": "font-weight", "fill": "fill"}
    attributes = "".join(f' {names[key]}="{value}"' for key, value in how.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{words}</text>'


if __name__ == "__main__":
    for theme in COLORS:
        (IMAGES / f"memory-{theme}.svg").write_text(svg(theme), encoding="utf-8")
