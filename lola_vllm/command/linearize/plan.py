"""What a recipe costs: tokens, hours, memory and disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lola_vllm.command.linearize.memory import parameters
from lola_vllm.command.linearize.recipe import Recipe, state_bytes
from lola_vllm.core.config import DecoderConfig
from lola_vllm.models.files import CheckpointError
from lola_vllm.training.calibrate.copying import ENOUGH, REPEATED
from lola_vllm.training.calibrate.run import COPYING_PROMPTS, TRIED_PROMPTS

# Seconds of a token over those of a forward pass of a row of training, measured on CPUs. A
# calibration reads long prompts, notes what they attend to, and fits importance: 1.5 (0.5B) and
# 1.75 (135M). Answers and perplexity take 2.5 (0.5B, whose vocabulary is large) and 1.1 (135M).
CALIBRATION_FACTOR, EVALUATION_FACTOR = 1.7, 1.8
LEAST_SCALE, MOST_SCALE = 0.02, 100.0  # of `scale_to`; below the first a stage is a few rows
GIB, MIB = 2**30, 2**20

# Stages in their order, with the words of the plan.
STAGES: dict[str, str] = {
    "transfer": "attention transfer",
    "lora": "LoRA",
    "calibrate": "calibration",
    "train-on": "training on",
    "recalibrate": "calibration of the result",
    "evaluate": "evaluation",
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


def stage_tokens(recipe: Recipe, kinds: int) -> dict[str, int]:
    """Tokens that each stage reads.

    Args:
        kinds: of text, each of which is measured.
    """
    calibration = _recorded_tokens(recipe)
    if recipe.calibrate.recent:  # to try divisions of them
        calibration += TRIED_PROMPTS * 2 * recipe.calibrate.prompt_length
        calibration += TRIED_PROMPTS * len(ENOUGH) * REPEATED
    asked = recipe.evaluate
    evaluation = len(asked.tasks) * asked.samples * sum(asked.lengths)
    evaluation += kinds * asked.windows * asked.window_length
    return {
        "transfer": recipe.train.rows * recipe.train.row_length,
        "lora": recipe.train.lora_tokens,
        "calibrate": calibration,
        "train-on": recipe.train_on.lora_tokens,
        "recalibrate": calibration,
        "evaluate": 2 * evaluation,  # the base and the model
    }


def _recorded_tokens(recipe: Recipe) -> int:
    """Tokens that a calibration reads to record what attention looks back to."""
    tokens = int(recipe.calibrate.prompts * recipe.calibrate.prompt_length * 0.75)
    if recipe.calibrate.recent:  # to find the heads that copy
        tokens += COPYING_PROMPTS * 2 * recipe.calibrate.prompt_length
    return tokens


def stage_seconds(recipe: Recipe, speed: Speed, kinds: int) -> dict[str, float]:
    """Seconds that each stage takes at a measured speed."""
    of_token = {
        "transfer": speed.transfer,
        "lora": speed.lora,
        "calibrate": CALIBRATION_FACTOR * speed.forward,
        "train-on": speed.on,
        "recalibrate": CALIBRATION_FACTOR * speed.forward,
        "evaluate": EVALUATION_FACTOR * speed.forward,
    }
    return {name: n * of_token[name] for name, n in stage_tokens(recipe, kinds).items()}


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
            f"{seconds_of(LEAST_SCALE) / 3600:.2f} on this machine; give more, or fewer prompts "
            "and samples by --recipe"
        )
    low, high = LEAST_SCALE, 2 * LEAST_SCALE
    while seconds_of(high) < wanted and high < MOST_SCALE:  # texts may hold too little for more
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds_of(middle) <= wanted else (low, middle)
    return low


def peak_bytes(config: DecoderConfig, recipe: Recipe) -> int:
    """Memory of the largest stage, about."""
    d, heads = int(config.head_dim or 0), config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    weights = parameters(config)
    train = recipe.train
    width = 2 if train.dtype == "bfloat16" else 4
    row = train.row_length
    transfer = weights * width + 4 * 4 * row * d * (heads + kv_heads)
    transfer += 12 * train.queries_per_step * heads * (row + 4 * d)
    lora = weights * width + recipe.activation_bytes(config, whole=not train.gradient_checkpointing)
    pair = 3 * d + 8  # features of a key and a value in float16, error and attention in float32
    read = _recorded_tokens(recipe) * config.num_hidden_layers * kv_heads * pair
    return max(transfer, lora, 4 * weights + read)


def disk_bytes(config: DecoderConfig, recipe: Recipe) -> int:
    """What the working directory takes at most, and the model, about."""
    hidden = 2 * recipe.train.rows * recipe.train.row_length * config.hidden_size
    hidden *= 2 if recipe.train.dtype == "bfloat16" else 4
    return hidden + 4 * 2 * parameters(config)  # models of stages, in bfloat16


def format_plan(base: Path, config: DecoderConfig, recipe: Recipe, speed: Speed, kinds: int) -> str:
    """The text that `--dry-run` prints."""
    tokens, seconds = stage_tokens(recipe, kinds), stage_seconds(recipe, speed, kinds)
    lines = [f"{'stage':26}  {'tokens':>10}  {'hours':>6}"]
    for name, title in STAGES.items():
        if name in tokens:
            lines.append(f"{title:26}  {tokens[name]:10,}  {seconds[name] / 3600:6.2f}")
    total = sum(tokens.values())
    lines.append(f"{'all':26}  {total:10,}  {sum(seconds.values()) / 3600:6.2f}")
    state = state_bytes(base, recipe.train_on.lola_config, recipe.pairs)
    lines += [
        "",
        f"a sequence of the model takes {state / MIB:.2f} MiB whatever its length: "
        f"{recipe.calibrate.pairs} pairs of a KV head by score and {recipe.calibrate.recent} "
        "recent ones",
        f"training needs about {peak_bytes(config, recipe) / GIB:.1f} GiB of memory and "
        f"{disk_bytes(config, recipe) / GIB:.1f} GiB of disk",
        "",
        json.dumps(asdict(recipe)),
    ]
    return "\n".join(lines)
