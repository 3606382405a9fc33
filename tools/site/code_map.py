"""The picture of docs/design.md: what lies where and what uses what, in docs/images/code-*.svg.

    python -m tools.site.code_map

A box is a folder or a file. It may use the boxes of all bands below its own, and in its own band
those that an arrow leads to. tests/unit/tools/site/test_code_map.py compares this with the imports
of the code. SVG is written for a light and a dark page.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tools.site.picture import COLORS, IMAGES, text

WIDTH = 700
TOP, HEAD, BOX, GAP = 8, 24, 52, 14  # heights: above all, of a band's title, of a box, below it
BAND = HEAD + BOX + GAP


@dataclass(frozen=True)
class Box:
    """A part of the code: its path in the repository, a few words, left edge and width."""

    path: str
    words: str
    x: int
    width: int


# From the top: what is said of a band, and its boxes from the left.
BANDS = (
    ("the command line", (
        Box("lola_vllm/command/", "lola-vllm VERB: linearize, client, doctor", 20, 660),
    )),
    ("what the verbs do", (
        Box("lola_vllm/evaluation/", "measures recall and perplexity", 20, 310),
        Box("serving/", "HTTP: routes, sessions, libraries, pages", 350, 330),
    )),
    ("making models", (
        Box("lola_vllm/training/", "texts, distillation, calibration", 20, 660),
    )),
    ("where models run", (
        Box("lola_vllm/engine/", "the plugin of vLLM, the model in transformers", 20, 660),
    )),
    ("what outlives a request", (
        Box("lola_vllm/memory/", "sessions, and documents that a question finds", 20, 660),
    )),
    ("files of models", (
        Box("lola_vllm/models/", "checkpoints, and the models that ship", 20, 660),
    )),
    ("the method", (
        Box("kernels/", "Triton", 20, 150),
        Box("lola_vllm/core/", "parameters, state, ops, reference", 202, 266),
        Box("csrc/", "C++ and CUDA", 500, 180),
    )),
)  # fmt: skip
# Who uses whom within a band. `core/` loads the compiled `csrc/`; the others are imports.
USES = (
    ("kernels/", "lola_vllm/core/"),
    ("lola_vllm/core/", "kernels/"),
    ("lola_vllm/core/", "csrc/"),
)


def svg(theme: str) -> str:
    """The picture for a "light" or a "dark" page."""
    return "\n".join(_elements(COLORS[theme])) + "\n"


def _elements(color: dict[str, str]) -> Iterator[str]:
    height = TOP + BAND * len(BANDS)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" font-family="system-ui, sans-serif" font-size="14" '
        f'fill="{color["text"]}">'
    )
    yield "<title>A part of the code uses what is below it, and what an arrow leads to</title>"
    for at, (title, row) in enumerate(BANDS):
        top = TOP + at * BAND
        yield text(20, top + 16, title, fill=color["faint"])
        for box in row:
            yield from _box(box, top + HEAD, color)
        for user, used in USES:
            ends = [[box for box in row if box.path == path] for path in (user, used)]
            if all(ends):
                yield _arrow(*ends[0], *ends[1], top + HEAD + BOX / 2, color["lola"])
    yield "</svg>"


def _box(box: Box, top: int, color: dict[str, str]) -> Iterator[str]:
    edge = color["stock"] if "/" not in box.path.rstrip("/") else color["grid"]
    yield (
        f'<rect x="{box.x}" y="{top}" width="{box.width}" height="{BOX}" rx="6" fill="none" '
        f'stroke="{edge}" stroke-width="1.5"/>'
    )
    middle = box.x + box.width / 2
    name = box.path.removeprefix("lola_vllm/")
    yield text(middle, top + 22, name, anchor="middle", weight="600")
    yield text(middle, top + 41, box.words, anchor="middle", fill=color["faint"])


def _arrow(user: Box, used: Box, y: float, stroke: str) -> str:
    """From box to box where they lie beside each other; where both use each other it has two heads,
    each drawn by one of the two."""
    right = used.x > user.x
    start = user.x + user.width + 7 if right else user.x - 7
    end, back = (used.x - 3, -7) if right else (used.x + used.width + 3, 7)
    return (
        f'<path d="M{start} {y:.0f}H{end}m{back} -5l{-back} 5l{back} 5" fill="none" '
        f'stroke="{stroke}" stroke-width="2"/>'
    )


if __name__ == "__main__":
    for theme in COLORS:
        (IMAGES / f"code-{theme}.svg").write_text(svg(theme), encoding="utf-8")
