"""The loss curves of a distillation as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_losses(losses: Mapping[str, Any], path: Path) -> None:
    """Draw the losses of `transfer` (a list per layer) and `finetune` (a list) into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [stage for stage in ("transfer", "finetune") if losses.get(stage)]
    if not stages:
        return
    figure, axes = pyplot.subplots(1, len(stages), figsize=(5.5 * len(stages), 4), squeeze=False)
    for stage, panel in zip(stages, axes[0], strict=True):
        if stage == "transfer":
            layers: list[list[float]] = losses[stage]
            colours = matplotlib.colormaps["viridis"]
            for i, curve in enumerate(layers):
                colour = colours(i / max(1, len(layers) - 1))
                panel.plot(_smooth(curve), color=colour, lw=0.8, marker=_marker(curve))
            panel.set(title="attention transfer, one line per layer (dark: first)", xlabel="step")
            panel.set(ylabel="relative error of the output", yscale="log")
        else:
            panel.plot(_smooth(losses[stage]), marker=_marker(losses[stage]))
            panel.set(title="LoRA", xlabel="step", ylabel="loss")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _marker(curve: Sequence[float]) -> str:
    """A dot if there is one step only, because a line of one point is not visible."""
    return "o" if len(curve) == 1 else ""


def _smooth(values: Sequence[float], width: int = 15) -> list[float]:
    """Running means, because the loss varies from row to row."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))
    ]
