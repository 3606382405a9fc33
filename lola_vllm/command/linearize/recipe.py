"""What `lola-vllm linearize` does in numbers, and the rules by which they follow from the base.

The defaults of `DistillOptions` and `CalibrateOptions` are those of the demo model,
SmolLM2-135M-Instruct. What depends on a model follows from its trained length P, from the memory of
a sequence, from the text, and from the time given.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, get_type_hints

from lola_vllm.core.config import DecoderConfig
from lola_vllm.models.files import CheckpointError
from lola_vllm.training.calibrate.copying import LEAST_DISTANCE, PASSAGE, REPEATED
from lola_vllm.training.calibrate.options import CalibrateOptions
from lola_vllm.training.distill.options import DistillOptions
from lola_vllm.training.recipe import settled, unknown_key

# Of the demo model: pairs of a KV head, on average, that scores choose, and newest ones.
SCORED, RECENT = 49, 378
# A pair for so many tokens of the trained length: a cache that holds most of it is no cache.
LENGTH_PER_PAIR = 16
MOST_PAIRS = 2**20  # of a KV head, whatever the memory
# The demo model's smaller sparse cache in training. Larger ones need longer rows.
MOST_FEW = 128
# Tokens that the stages of the demo model read.
TRANSFER_TOKENS, LORA_TOKENS, ON_TOKENS = 393_216, 393_216, 225_280
# Rows of attention transfer are as long as the trained length, while there are so many of them:
# maps of shorter rows answer wrongly beyond them.
LEAST_ROWS, LONGEST_ROW = 6, 32_768
LEAST_PROMPTS = 24  # of a calibration
BYTES_PER_TOKEN = 4  # of English, about
# What a hidden state must be worth to be kept, in nats a token. Less is noise, and costs chains.
STATE_WORTH = 0.01


@dataclass(frozen=True)
class Recipe:
    """The options of all stages.

    Attributes:
        train: of attention transfer and LoRA.
        calibrate: of both calibrations.
        train_on: of training on for the first calibration. Its `lola_config` is the model's,
            without the sizes that calibrations find.
    """

    train: DistillOptions
    calibrate: CalibrateOptions
    train_on: DistillOptions

    @property
    def pairs(self) -> int:
        """Of a KV head, on average."""
        return self.calibrate.pairs + self.calibrate.recent

    def activation_bytes(self, config: DecoderConfig) -> int:
        """What the gradient of the largest row of stage 2 needs, about, with all layers at once."""
        train, on = self.train, self.train_on
        window = on.lola_config["window_size"]
        d, D, heads = config.head_dim, config.hidden_size, config.num_attention_heads
        kv_heads, width = config.num_key_value_heads, 2 if train.dtype == "bfloat16" else 4
        plain = (8 * D + 4 * config.intermediate_size + 4 * heads * d) * width
        found = 0
        for length, exact, interval in (  # exact pairs of a query outside the window
            (train.lora_last_row_length or train.lora_row_length, max(train.train_sparse_caches),
             window),
            (on.lora_row_length, self.pairs, on.lola_config["update_interval"]),
        ):  # fmt: skip
            seen = min(length, exact + 2 * window)
            listed = 16 * kv_heads * seen / interval  # where the pairs of each chunk are, int64
            # Queries, keys, values, features and answers in float32, and H of each chunk.
            features = 56 * d * (heads + kv_heads) + 16 * d * d * kv_heads / interval
            token = plain + listed + features
            found = max(found, int(length * config.num_hidden_layers * token))
        return found


def derive(
    base: Path,
    *,
    text_bytes: int,
    memory_mib: float | None = None,
    scale: float = 1.0,
    dtype: str = "bfloat16",
    free_bytes: int = 2**62,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe for a base.

    Args:
        base: a local directory of the softmax model.
        text_bytes: of all texts to train on.
        memory_mib: of a sequence, in MiB; None: of 427 pairs in a KV head.
        scale: factor on the tokens of the stages that train; below 1 also on the prompts of
            calibrations.
        dtype: in which the machine is fast: "bfloat16" or "float32".
        free_bytes: memory of the machine or the GPU that is free.
        overrides: options to set, by part of the recipe and name. What a later part takes from an
            earlier one, such as the rank of the adapters, it takes with its overrides.

    Raises:
        CheckpointError: a base that is not supported, one with too short a trained length, too
            little memory for any pair, or an override that is none.
    """
    from lola_vllm.models.base import parse_config, read_base_config

    given = dict(overrides or {})
    for key in given.keys() - _names().keys():
        raise unknown_key(key, [f"{part}.{name}" for part, own in _names().items() for name in own])
    config = parse_config(base, read_base_config(base))
    length = config.max_position_embeddings
    if length < 256:
        raise CheckpointError(
            f"{base / 'config.json'}: max_position_embeddings = {length}: a base with a trained "
            "length of 256 tokens or more is needed"
        )
    window = min(64, length // 8)
    of_updates = {"update_interval": min(16, window), "sparse_dtype": "int8"}
    pairs = min(SCORED + RECENT, length // LENGTH_PER_PAIR)
    if memory_mib is not None:
        served = {"window_size": window, "sink_size": 4, **of_updates}
        pairs = pairs_in(base, served, memory_mib)
    scored = max(1, round(pairs * SCORED / (SCORED + RECENT)))
    if length <= LEAST_DISTANCE + PASSAGE + REPEATED:  # no room to find the heads that copy
        scored = pairs
    # Maps are used to much and to little in the hidden state, and rows need not be long to fold
    # something, however much memory there is.
    few = min(MOST_FEW, 1 << round(math.log2(max(1, pairs / 3))))
    folding = 4 * window + 4 * few + 4  # two windows, two intervals, cache and sinks
    first = min(length, _power_above(folding))
    last, later = _grown(first, 4, length), _grown(first, 2, length)
    at_most = text_bytes // BYTES_PER_TOKEN

    def tokens(number: int, least: int) -> int:
        return max(least, min(int(number * scale), at_most))

    transfer = tokens(TRANSFER_TOKENS, 2 * first)
    row = _power_below(min(length, LONGEST_ROW, max(2 * first, transfer // LEAST_ROWS)))

    def made(gradient_checkpointing: bool) -> Recipe:
        train = DistillOptions(
            dtype=cast(Any, dtype),
            rows=max(1, transfer // row),
            row_length=row,
            # Short rows are cheap, long ones mend what is read from far back.
            lora_rows=growing_rows(tokens(LORA_TOKENS, 12 * first), first, last),
            lora_row_length=first,
            lora_last_row_length=last,
            gradient_checkpointing=gradient_checkpointing,
            # An update every window is the cheapest.
            lola_config={"window_size": window, "sink_size": 4},
            train_windows=(window, 2 * window),
            train_sparse_caches=(0, few, 4 * few),
        )
        train = settled(train, given.get("train", {}), "train")
        calibrate = CalibrateOptions(
            pairs=scored,
            least=min(CalibrateOptions.least, max(1, scored // 2)),
            recent=pairs - scored,
            # By another mixing no gate can be closed to try it.
            state_worth=STATE_WORTH if train.lola_config.get("mixing", "lola") == "lola" else 0.0,
            prompts=max(LEAST_PROMPTS, round(CalibrateOptions.prompts * min(1.0, scale))),
            prompt_length=min(CalibrateOptions.prompt_length, length),
            dtype=train.dtype,
            seed=train.seed,
        )
        train_on = replace(
            train,
            retrieval_fraction=0.6,
            seed=train.seed + 1,
            lora_rows=max(train.rows_per_step, tokens(ON_TOKENS, 4 * first) // later),
            lora_row_length=later,
            lora_last_row_length=0,
            lora_learning_rate=8e-4,
            map_learning_rate=1e-3,
            answer_weight=8.0,
            loss_tokens=384,
            average=1.0,  # the mean lies between the weights before and after
            lora_kept=0.5,  # between the base and the fine-tuned model (WiSE-FT, arXiv 2109.01903)
            lola_config={**train.lola_config, **of_updates},
            train_windows=(),
            train_sparse_caches=(),
        )
        return Recipe(
            train,
            settled(calibrate, given.get("calibrate", {}), "calibrate"),
            settled(train_on, given.get("train_on", {}), "train_on"),
        )

    recipe = made(False)
    crowded = 2 * recipe.activation_bytes(config) > free_bytes
    return made(True) if crowded else recipe


def check(recipe: Recipe) -> None:
    """Refuse a recipe with rows in which nothing is folded, or with two ranks.

    Raises:
        CheckpointError: names the option, its value and the least one that does.
        LolaConfigError: a `lola_config` that is not valid.
    """
    from lola_vllm.training.distill.transfer import check_row_length

    train, rank = recipe.train, recipe.train_on.lora_rank
    check_row_length("train.row_length", train.row_length, train.configs())
    check_row_length("train.lora_row_length", train.lora_row_length, train.configs())
    train.lora_lengths()
    on = with_sizes(recipe.train_on, recipe.calibrate.least)
    check_row_length("train_on.lora_row_length", on.lora_row_length, on.configs())
    if rank != train.lora_rank:
        raise CheckpointError(
            f"--recipe: train_on.lora_rank = {rank}: must be that of train, {train.lora_rank}"
        )


def with_sizes(options: DistillOptions, sizes: Any) -> DistillOptions:
    """Options of training on with a `sparse_cache_size`, where there is no calibration yet."""
    return replace(options, lola_config={**options.lola_config, "sparse_cache_size": sizes})


def growing_rows(tokens: int, first: int, last: int) -> int:
    """Rows that have so many tokens together, as many of each length from `first` to `last`."""
    lengths = [first << i for i in range((last // first).bit_length())]
    each = tokens / len(lengths)
    return max(2 ** len(lengths) - 1, round(sum(each / length for length in lengths)))


def _names() -> dict[str, set[str]]:
    parts = get_type_hints(Recipe).items()
    return {part: {item.name for item in fields(kind)} for part, kind in parts}


def from_json(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `dataclasses.asdict` gave as `values`, perhaps by way of JSON.

    Raises:
        CheckpointError: of a version whose recipe has other options.
    """
    names = _names()
    if values.keys() != names.keys() or any(values[part].keys() != names[part] for part in names):
        raise CheckpointError(
            "the run was begun by another version, whose recipe has other options; go on with that "
            "version, or begin anew with another --work-dir"
        )
    made: dict[str, Any] = {
        part: kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values[part].items()})
        for part, kind in get_type_hints(Recipe).items()
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

    def size(pairs: int) -> int:
        return state_bytes(base, lola_config, pairs)

    if (least := size(1)) > budget:
        raise CheckpointError(
            f"--memory {memory_mib:g}: window and hidden state alone take "
            f"{least / 2**20:.2f} MiB; give more"
        )
    return bisect_right(range(1, MOST_PAIRS), budget, key=size)


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
    return estimate(base, keys).bytes_per_sequence


def _grown(first: int, times: int, length: int) -> int:
    """`first` doubled up to `times`, as far as the trained length reaches."""
    while times > 1 and first * times > length:
        times //= 2
    return first * times


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _power_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)
