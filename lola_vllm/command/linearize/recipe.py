"""Every hyperparameter of `lola-vllm linearize`, and the rule by which it follows from the base.

The constants are those of the demo model, SmolLM2-135M-Instruct. What depends on a model follows
from its trained length P, from the memory of a sequence, from the text, and from the time given.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lola_vllm.command.linearize.memory import TrainedRow, activation_bytes
from lola_vllm.core.config import LolaConfig, LolaLlamaConfig
from lola_vllm.models.files import CheckpointError
from lola_vllm.training.calibrate.copying import LEAST_DISTANCE, PASSAGE, REPEATED

# Of the demo model: pairs of a KV head, on average, that scores choose, and newest ones.
SCORED, RECENT = 49, 378
# A pair for so many tokens of the trained length: a cache that holds most of it is no cache.
LENGTH_PER_PAIR = 16
# The demo model's smaller sparse cache in training. Larger ones need longer rows.
MOST_FEW = 128
# Tokens that the stages of the demo model read.
TRANSFER_TOKENS, LORA_TOKENS, ON_TOKENS = 393_216, 393_216, 225_280
# Rows of attention transfer are as long as the trained length, while there are so many of them.
LEAST_ROWS, LONGEST_ROW = 6, 32_768
# Prompts of a calibration, needles of a cell, windows of a text: of the demo model, and at least.
PROMPTS, LEAST_PROMPTS = 56, 24
SAMPLES, LEAST_SAMPLES = 10, 4
WINDOWS, LEAST_WINDOWS = 4, 2
BYTES_PER_TOKEN = 4  # of English, about


@dataclass(frozen=True)
class Recipe:
    """What `lola-vllm linearize` does, in numbers. Lengths are in tokens.

    Attributes:
        window_size, sink_size, update_interval, sparse_dtype: keys of `lola_config`. 64 (an eighth
            of P if that is less), 4, 16 (at most the window) and "int8".
        scored_pairs, recent_pairs: of a KV head, on average: chosen by score, and the newest. As
            many as `--memory` has room for, in the proportion of the demo model, 49 to 378;
            without it 427 together, or P / 16 if that is less. No recent ones where P has no room
            for the prompts that find the heads which copy (750 tokens).
        seed: of all that is drawn.
        dtype: of the base's weights: the one in which the machine is fast. Maps and adapters are
            float32.
        retrieval_fraction: share of rows that hide facts and ask for them, in the first two stages.
        window_factor_rate: 10. Learning rate of the window factors, over that of the feature maps.

        transfer_tokens: of stage 1, attention transfer: 393,216 times the scale that `--hours`
            gives, at most as many as the texts have.
        transfer_row_length: the largest power of two of which there are 6 rows, at most P and
            32,768: maps of shorter rows answer wrongly beyond them.
        transfer_steps_per_row, transfer_queries, transfer_learning_rate: 7, 512 and 0.03.

        train_windows: what stages 1 and 2 train for: the window, and twice that.
        train_sparse_caches: 0, the power of two that is nearest to a third of all pairs, at most
            128, and four times that. So maps are used to much and to little in the hidden state,
            and rows need not be long to fold something, however much memory there is.

        lora_tokens: of stage 2: 393,216, scaled likewise.
        lora_row_length, lora_last_row_length: the least power of two in which all of these fold
            something, and four times that, at most P. Rows grow from the one to the other: short
            ones are cheap, long ones mend what is read from far back.
        lora_rank, lora_learning_rate, map_learning_rate, answer_weight, rows_per_step: 16, 0.002,
            0.003, 4 and 2.
        lora_average: share of the steps whose weights are averaged: 0.5.
        gradient_checkpointing: activations are computed twice. True where those of the longest row
            would take more than half of the free memory.

        calibration_prompts, calibration_prompt_length, calibration_facts: 56 prompts of 4,096
            tokens or half of it, at most P; 0.75 of them ask for facts. Less time scales the number
            too, to 24 at least.
        calibration_least: pairs of any KV head, 16 or half of `scored_pairs` if that is less.

        on_tokens: of training on for the calibration: 225,280, scaled likewise.
        on_row_length: twice `lora_row_length`, at most P.
        on_retrieval_fraction, on_answer_weight, on_loss_tokens, on_learning_rate,
            on_map_learning_rate: 0.6, 8, 384, 0.0008 and 0.001.
        on_average: 1, the mean of all steps: it lies between the weights before and after.
        on_lora_kept: 0.5. Share of what all training adds to the projections that the model keeps:
            a model between the base and the fine-tuned one (WiSE-FT, arXiv 2109.01903, section 3).

        evaluation_tasks, evaluation_lengths, evaluation_samples: needles in noise and in prose, at
            1,024, 2,048 and 4,096 tokens as far as P reaches, 10 each (4 in little time); 0 samples
            leave them out.
        evaluation_windows, evaluation_window_length: of held-out text for perplexity, of each kind:
            4 of 2,048 tokens (2 in little time), at most half of P; 0 windows leave it out.
    """

    window_size: int
    sink_size: int
    update_interval: int
    sparse_dtype: str
    scored_pairs: int
    recent_pairs: int
    seed: int
    dtype: str
    retrieval_fraction: float
    window_factor_rate: float

    transfer_tokens: int
    transfer_row_length: int
    transfer_steps_per_row: int
    transfer_queries: int
    transfer_learning_rate: float

    train_windows: tuple[int, ...]
    train_sparse_caches: tuple[int, ...]

    lora_tokens: int
    lora_row_length: int
    lora_last_row_length: int
    lora_rank: int
    lora_learning_rate: float
    map_learning_rate: float
    answer_weight: float
    rows_per_step: int
    lora_average: float
    gradient_checkpointing: bool

    calibration_prompts: int
    calibration_prompt_length: int
    calibration_facts: float
    calibration_least: int

    on_tokens: int
    on_row_length: int
    on_retrieval_fraction: float
    on_answer_weight: float
    on_loss_tokens: int
    on_learning_rate: float
    on_map_learning_rate: float
    on_average: float
    on_lora_kept: float

    evaluation_tasks: tuple[str, ...]
    evaluation_lengths: tuple[int, ...]
    evaluation_samples: int
    evaluation_windows: int
    evaluation_window_length: int

    def served(self) -> dict[str, Any]:
        """Keys of `lola_config` of the model, without the sizes that calibration finds."""
        return {
            "window_size": self.window_size,
            "sink_size": self.sink_size,
            "update_interval": self.update_interval,
            "sparse_dtype": self.sparse_dtype,
        }

    def trained(self) -> dict[str, Any]:
        """Keys of `lola_config` in the first two stages. An update every window is the cheapest."""
        return {"window_size": self.window_size, "sink_size": self.sink_size}

    @property
    def pairs(self) -> int:
        """Of a KV head, on average."""
        return self.scored_pairs + self.recent_pairs

    def activation_bytes(self, config: LolaLlamaConfig, *, whole: bool) -> int:
        """As `memory.activation_bytes`, of the rows of stage 2."""
        exact = max(self.train_sparse_caches)
        rows = (
            TrainedRow(self.lora_last_row_length, exact, self.window_size),
            TrainedRow(self.on_row_length, self.pairs, self.update_interval),
        )
        width = 2 if self.dtype == "bfloat16" else 4
        return activation_bytes(config, rows, window=self.window_size, width=width, whole=whole)


def derive(
    base: Path,
    *,
    text_bytes: int,
    memory_mib: float | None = None,
    scale: float = 1.0,
    dtype: str = "bfloat16",
    free_bytes: int = 2**62,
) -> Recipe:
    """The recipe for a base.

    Args:
        base: a local directory of the softmax model.
        text_bytes: of all texts to train on.
        memory_mib: of a sequence, in MiB; None: of 427 pairs in a KV head.
        scale: factor on the tokens of the stages that train; below 1 also on the prompts of
            calibrations and the questions of the evaluation.
        dtype: in which the machine is fast: "bfloat16" or "float32".
        free_bytes: memory of the machine or the GPU that is free.

    Raises:
        CheckpointError: a base that is not supported, one with too short a trained length, or too
            little memory for any pair.
    """
    from lola_vllm.models.base import parse_config, read_base_config

    config = parse_config(base, read_base_config(base))
    length = config.max_position_embeddings
    if length < 256:
        raise CheckpointError(
            f"{base / 'config.json'}: max_position_embeddings = {length}: a base with a trained "
            "length of 256 tokens or more is needed"
        )
    window = min(64, length // 8)
    served: dict[str, Any] = {
        "window_size": window,
        "sink_size": 4,
        "update_interval": min(16, window),
        "sparse_dtype": "int8",
    }
    pairs = min(SCORED + RECENT, length // LENGTH_PER_PAIR)
    if memory_mib is not None:
        pairs = pairs_in(base, served, memory_mib)
    scored = max(1, round(pairs * SCORED / (SCORED + RECENT)))
    if length <= LEAST_DISTANCE + PASSAGE + REPEATED:
        scored = pairs
    few = min(MOST_FEW, 1 << round(math.log2(max(1, pairs / 3))))
    caches = (0, few, 4 * few)
    folding = 4 * window + 4 * few + 4  # two windows, two intervals, cache and sinks
    first = min(length, _power_above(folding))
    at_most = text_bytes // BYTES_PER_TOKEN

    def tokens(number: int, least: int) -> int:
        return max(least, min(int(number * scale), at_most))

    def fewer(number: int, least: int) -> int:
        return max(least, round(number * min(1.0, scale)))

    transfer = tokens(TRANSFER_TOKENS, 2 * first)
    row = _power_below(min(length, LONGEST_ROW, max(2 * first, transfer // LEAST_ROWS)))
    prompt = min(4096, length)
    recipe = Recipe(
        **served,
        scored_pairs=scored,
        recent_pairs=pairs - scored,
        seed=0,
        dtype=dtype,
        retrieval_fraction=0.25,
        window_factor_rate=10.0,
        transfer_tokens=max(transfer, row),
        transfer_row_length=row,
        transfer_steps_per_row=7,
        transfer_queries=512,
        transfer_learning_rate=3e-2,
        train_windows=(window, 2 * window),
        train_sparse_caches=caches,
        lora_tokens=tokens(LORA_TOKENS, 12 * first),
        lora_row_length=first,
        lora_last_row_length=_grown(first, 4, length),
        lora_rank=16,
        lora_learning_rate=2e-3,
        map_learning_rate=3e-3,
        answer_weight=4.0,
        rows_per_step=2,
        lora_average=0.5,
        gradient_checkpointing=False,
        calibration_prompts=fewer(PROMPTS, LEAST_PROMPTS),
        calibration_prompt_length=prompt,
        calibration_facts=0.75,
        calibration_least=min(16, max(1, scored // 2)),
        on_tokens=tokens(ON_TOKENS, 4 * first),
        on_row_length=_grown(first, 2, length),
        on_retrieval_fraction=0.6,
        on_answer_weight=8.0,
        on_loss_tokens=384,
        on_learning_rate=8e-4,
        on_map_learning_rate=1e-3,
        on_average=1.0,
        on_lora_kept=0.5,
        evaluation_tasks=("niah-1", "niah-2"),
        evaluation_lengths=tuple(n for n in (1024, 2048, 4096) if n <= length) or (length,),
        evaluation_samples=fewer(SAMPLES, LEAST_SAMPLES),
        evaluation_windows=fewer(WINDOWS, LEAST_WINDOWS),
        evaluation_window_length=min(2048, length // 2),
    )
    crowded = 2 * recipe.activation_bytes(config, whole=True) > free_bytes
    return replace(recipe, gradient_checkpointing=crowded)


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with values that a user wrote; others stay as they were derived.

    Raises:
        CheckpointError: a key that is none, or a value of another type.
    """
    known = {item.name: getattr(recipe, item.name) for item in fields(Recipe)}
    chosen: dict[str, Any] = {}
    for key, value in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise CheckpointError(
                f"--recipe: unknown key {key!r}; did you mean {near[0]!r}? 'lola-vllm linearize "
                "--dry-run' prints all"
            )
        chosen[key] = _like(key, known[key], value)
    return replace(recipe, **chosen)


def _like(key: str, own: Any, value: Any) -> Any:
    """`value` if it is of the type of a field's own value."""
    if isinstance(own, tuple):
        kind = type(own[0])
        if isinstance(value, list | tuple) and value and all(type(x) is kind for x in value):
            return tuple(value)
    elif isinstance(own, float):
        if type(value) in (int, float):
            return float(value)
    elif type(value) is type(own) and not (type(value) is int and value < 0):
        return value
    raise CheckpointError(f"--recipe: {key} = {value!r}: must be of the kind of {own!r}")


def to_json(recipe: Recipe) -> dict[str, Any]:
    """All values by name, as JSON has them."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(recipe).items()
    }


def from_json(values: Mapping[str, Any]) -> Recipe:
    """What `to_json` gave.

    Raises:
        CheckpointError: of a version whose recipe has other fields.
    """
    other = sorted({item.name for item in fields(Recipe)} ^ values.keys())
    if other:
        raise CheckpointError(
            f"the run was begun by another version, whose recipe differs in {', '.join(other)}; go "
            "on with that version, or begin anew with another --work-dir"
        )
    made: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return Recipe(**made)


def pairs_in(base: Path, lola_config: Mapping[str, Any], memory_mib: float) -> int:
    """Pairs of a KV head, on average, that fit the memory of a sequence.

    Args:
        base: a local directory, of which the config is read.
        lola_config: keys without sizes.
        memory_mib: of a state, in MiB.

    Raises:
        CheckpointError: not even one pair in every head fits; names the least memory.
    """
    budget = int(memory_mib * 2**20)
    least = state_bytes(base, lola_config, 1)
    if least > budget:
        raise CheckpointError(
            f"--memory {memory_mib:g}: window and hidden state alone take "
            f"{least / 2**20:.2f} MiB; give more"
        )
    low, high = 1, 2
    while state_bytes(base, lola_config, high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if state_bytes(base, lola_config, middle) <= budget:
            low = middle
        else:
            high = middle
    return low


def unlike(heads: int, layers: int, pairs: int) -> list[Any]:
    """Sizes of KV heads that differ, so that each has a page, as after a calibration; so many pairs
    on average."""
    sizes = [pairs + 1, *[pairs] * (heads - 2), pairs - 1] if heads > 1 else pairs
    return [sizes] * layers


def state_bytes(base: Path, lola_config: Mapping[str, Any], pairs: int) -> int:
    """Bytes of a sequence whose KV heads have caches of their own, of so many pairs on average."""
    from lola_vllm.engine.estimate import estimate
    from lola_vllm.models.base import parse_config, read_base_config

    config = parse_config(base, read_base_config(base))
    heads = config.num_key_value_heads
    assert isinstance(heads, int)
    keys = {**lola_config, "sparse_cache_size": unlike(heads, config.num_hidden_layers, pairs)}
    LolaConfig(**keys)
    row = next(row for row in estimate(base, keys).rows if row.chosen)
    return row.bytes_per_sequence


def _grown(first: int, times: int, length: int) -> int:
    """`first` doubled up to `times`, as far as the trained length reaches."""
    while times > 1 and first * times > length:
        times //= 2
    return first * times


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _power_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)
