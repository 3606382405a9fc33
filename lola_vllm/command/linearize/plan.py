"""The stages of a recipe: what they read, and how long they take."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lola_vllm.command.linearize.recipe import Recipe, state_bytes
from lola_vllm.models.files import CheckpointError
from lola_vllm.training.calibrate.copying import ENOUGH, REPEATED
from lola_vllm.training.calibrate.run import COPYING_PROMPTS, TRIED_OF_EIGHT, TRIED_PROMPTS
from lola_vllm.training.calibrate.states import PROMPTS

# Seconds of a token of a calibration over those of a forward pass of a row of training, measured on
# CPUs: 1.5 (0.5B) and 1.75 (135M). It reads long prompts, notes what they attend to, and fits
# importance. A token that goes back through the model, too, takes so many times as long.
CALIBRATION_FACTOR = 1.7
BACKWARD_FACTOR = 3
LEAST_SCALE, MOST_SCALE = 0.02, 100.0  # of `scale_to`; below the first a stage is a few rows

# Stages in their order, with the words of the plan.
STAGES: dict[str, str] = {
    "transfer": "attention transfer",
    "lora": "LoRA",
    "calibrate": "calibration",
    "train-on": "training on",
    "recalibrate": "calibration of the result",
    "card": "model and card",
}


@dataclass(frozen=True)
class Speed:
    """Seconds that a token takes on this machine, in all layers.

    Attributes:
        forward: read by the softmax model. transfer: trained on in stage 1.
        lora: trained on in stage 2. on: trained on for a calibration.
    """

    forward: float
    transfer: float
    lora: float
    on: float


def stage_tokens(recipe: Recipe) -> dict[str, int]:
    """Tokens that each stage reads."""
    calibration = int(recipe.calibrate.prompts * recipe.calibrate.prompt_length * 0.75)
    tried = sum(i % 8 in TRIED_OF_EIGHT for i in range(recipe.calibrate.prompts))
    calibration += BACKWARD_FACTOR * tried * recipe.calibrate.prompt_length
    if recipe.calibrate.recent:  # to find the heads that copy, and to try divisions of them
        prompts = COPYING_PROMPTS + TRIED_PROMPTS
        calibration += prompts * 2 * recipe.calibrate.prompt_length
        calibration += TRIED_PROMPTS * len(ENOUGH) * REPEATED
    trials = 0
    if recipe.calibrate.state_worth:  # two models read a prompt, and one its end for every head
        trials = PROMPTS * 4 * recipe.calibrate.prompt_length
    return {
        "transfer": recipe.train.rows * recipe.train.row_length,
        "lora": recipe.train.lora_tokens,
        "calibrate": calibration,
        "train-on": recipe.train_on.lora_tokens,
        "recalibrate": calibration + trials,
    }


def stage_seconds(recipe: Recipe, speed: Speed) -> dict[str, float]:
    """Seconds that each stage takes at a measured speed."""
    of_token = {
        "transfer": speed.transfer,
        "lora": speed.lora,
        "calibrate": CALIBRATION_FACTOR * speed.forward,
        "train-on": speed.on,
        "recalibrate": CALIBRATION_FACTOR * speed.forward,
    }
    return {name: n * of_token[name] for name, n in stage_tokens(recipe).items()}


def scale_to(hours: float, seconds_of: Callable[[float], float]) -> float:
    """The scale of a recipe (`derive`) with which all stages take so many hours.

    Args:
        hours: of all stages.
        seconds_of: what a recipe of a scale takes; it must not fall.

    Raises:
        CheckpointError: too few hours; names the least number.
    """
    wanted = hours * 3600
    if seconds_of(LEAST_SCALE) > wanted:
        raise CheckpointError(
            f"--hours {hours:g}: the least that trains anything takes "
            f"{seconds_of(LEAST_SCALE) / 3600:.2f} on this machine; give more, or fewer "
            "prompts by --recipe"
        )
    low, high = LEAST_SCALE, 2 * LEAST_SCALE
    while seconds_of(high) < wanted and high < MOST_SCALE:  # texts may hold too little for more
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds_of(middle) <= wanted else (low, middle)
    return low


def format_plan(base: Path, recipe: Recipe, speed: Speed) -> str:
    """The text that `--dry-run` prints."""
    tokens, seconds = stage_tokens(recipe), stage_seconds(recipe, speed)
    rows = [(STAGES[name], number, seconds[name] / 3600) for name, number in tokens.items()]
    rows.append(("all", sum(tokens.values()), sum(seconds.values()) / 3600))
    lines = [f"{'stage':26}  {'tokens':>10}  {'hours':>6}"]
    lines += [f"{title:26}  {number:10,}  {spent:6.2f}" for title, number, spent in rows]
    state = state_bytes(base, recipe.train_on.lola_config, recipe.pairs)
    lines += [
        "",
        f"a sequence of the model takes {state / 2**20:.2f} MiB whatever its length: "
        f"{recipe.calibrate.pairs} pairs of a KV head by score and {recipe.calibrate.recent} "
        "recent ones",
        "",
        json.dumps(asdict(recipe)),
    ]
    return "\n".join(lines)
