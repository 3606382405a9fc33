"""The stages of a recipe, and what they read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from lola_vllm.command.linearize.recipe import Recipe, state_bytes
from lola_vllm.training.calibrate.copying import ENOUGH, REPEATED
from lola_vllm.training.calibrate.run import COPYING_PROMPTS, TRIED_PROMPTS

# Stages in their order, with the words of the plan.
STAGES: dict[str, str] = {
    "transfer": "attention transfer",
    "lora": "LoRA",
    "calibrate": "calibration",
    "train-on": "training on",
    "recalibrate": "calibration of the result",
    "card": "model and card",
}


def stage_tokens(recipe: Recipe) -> dict[str, int]:
    """Tokens that each stage reads."""
    calibration = int(recipe.calibrate.prompts * recipe.calibrate.prompt_length * 0.75)
    if recipe.calibrate.recent:  # to find the heads that copy, and to try divisions of them
        prompts = COPYING_PROMPTS + TRIED_PROMPTS
        calibration += prompts * 2 * recipe.calibrate.prompt_length
        calibration += TRIED_PROMPTS * len(ENOUGH) * REPEATED
    return {
        "transfer": recipe.train.rows * recipe.train.row_length,
        "lora": recipe.train.lora_tokens,
        "calibrate": calibration,
        "train-on": recipe.train_on.lora_tokens,
        "recalibrate": calibration,
    }


def format_plan(base: Path, recipe: Recipe) -> str:
    """The text that `--dry-run` prints."""
    tokens = stage_tokens(recipe)
    lines = [f"{'stage':26}  {'tokens':>10}"]
    lines += [f"{STAGES[name]:26}  {number:10,}" for name, number in tokens.items()]
    lines.append(f"{'all':26}  {sum(tokens.values()):10,}")
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
