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
from typing import Any

from tools.site.summaries import RESULTS, ROOT

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

# Of each line the setting's name in the runs, its name here, its colour, how far below its dot each
# share stands, and how far right of and below the last dot the name ends.
LINES = (
    ("softmax teacher", "full KV cache", "stock", -10, -36, 0),
    ("as it ships", "LoLA", "lola", 20, 32, -12),
)


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
    runs = json.loads((RESULTS / "memory-picture.json").read_text())
    for setting, name, line, *places in LINES:
        found = [each for run in runs for each in run["settings"] if each["name"] == setting]
        yield from _line(found, name, color[line], *places)
    yield "</svg>"


def _line(
    found: list[dict[str, Any]], name: str, stroke: str, below: int, right: int, name_below: int
) -> Iterator[str]:
    """A line with its shares and its name, where the other lines leave room."""

    def mib(length: int) -> float:  # a state has one size, a full KV cache one per token
        setting = found[-1]
        return (setting["state_bytes"] or length * setting["full_kv_bytes_per_token"]) / 2**20

    points = " ".join(f"{_x(n):.1f},{_y(mib(n)):.1f}" for n in LENGTHS)
    yield f'<polyline points="{points}" fill="none" stroke="{stroke}" stroke-width="2.5"/>'
    cells = [cell for setting in found for cell in setting["cells"] if cell["task"] == TASK]
    recall = {cell["length"]: cell["rate"] for cell in cells}
    for length, share in sorted(recall.items()):
        x, y = _x(length), _y(mib(length))
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{stroke}"/>'
        words = f"{share:.0%}".replace("%", " %")
        yield text(x, y + below, words, anchor="middle", fill=stroke)
    last = LENGTHS[-1]
    label = f"{name}: {mib(last):.1f} MiB at {last:,}"
    x, y = _x(last) + right, _y(mib(last)) + name_below
    yield text(x, y, label, anchor="end", weight="600", fill=stroke)


def text(x: float, y: float, words: str, **how: str) -> str:
    """An element of SVG; `how`: its anchor, weight and fill."""
    names = {"anchor": "text-anchor", "weight": "font-weight", "fill": "fill"}
    attributes = "".join(f' {names[key]}="{value}"' for key, value in how.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{words}</text>'


if __name__ == "__main__":
    for theme in COLORS:
        (IMAGES / f"memory-{theme}.svg").write_text(svg(theme), encoding="utf-8")
