"""The options of the single verbs that a recipe stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lola_vllm.command.linearize.recipe import Recipe
from lola_vllm.training.calibrate.options import CalibrateOptions
from lola_vllm.training.distill.options import DistillOptions


def transfer_options(recipe: Recipe) -> DistillOptions:
    """Of stage 1 alone."""
    return DistillOptions(
        retrieval_fraction=recipe.retrieval_fraction,
        window_factor_rate=recipe.window_factor_rate,
        seed=recipe.seed,
        dtype=cast(Any, recipe.dtype),
        rows=max(1, recipe.transfer_tokens // recipe.transfer_row_length),
        row_length=recipe.transfer_row_length,
        learning_rate=recipe.transfer_learning_rate,
        steps_per_row=recipe.transfer_steps_per_row,
        queries_per_step=recipe.transfer_queries,
        lora_rows=0,
        lola_config=recipe.trained(),
        train_windows=recipe.train_windows,
        train_sparse_caches=recipe.train_sparse_caches,
    )


def lora_options(recipe: Recipe) -> DistillOptions:
    """Of stages 1 and 2; the first is that of `transfer_options`."""
    first = transfer_options(recipe)
    return DistillOptions(
        **{
            **vars(first),
            "lora_rows": growing_rows(
                recipe.lora_tokens, recipe.lora_row_length, recipe.lora_last_row_length
            ),
            "lora_row_length": recipe.lora_row_length,
            "lora_last_row_length": recipe.lora_last_row_length,
            "lora_rank": recipe.lora_rank,
            "lora_learning_rate": recipe.lora_learning_rate,
            "map_learning_rate": recipe.map_learning_rate,
            "answer_weight": recipe.answer_weight,
            "rows_per_step": recipe.rows_per_step,
            "average": recipe.lora_average,
            "gradient_checkpointing": recipe.gradient_checkpointing,
        }
    )


def on_options(recipe: Recipe, sizes: Mapping[str, Any] | None = None) -> DistillOptions:
    """Of training on for a calibration.

    Args:
        sizes: keys of `lola_config`, where there is no calibration that has them.
    """
    return DistillOptions(
        retrieval_fraction=recipe.on_retrieval_fraction,
        window_factor_rate=recipe.window_factor_rate,
        seed=recipe.seed + 1,
        dtype=cast(Any, recipe.dtype),
        lora_rows=max(recipe.rows_per_step, recipe.on_tokens // recipe.on_row_length),
        lora_row_length=recipe.on_row_length,
        lora_rank=recipe.lora_rank,
        lora_learning_rate=recipe.on_learning_rate,
        map_learning_rate=recipe.on_map_learning_rate,
        answer_weight=recipe.on_answer_weight,
        loss_tokens=recipe.on_loss_tokens,
        rows_per_step=recipe.rows_per_step,
        average=recipe.on_average,
        lora_kept=recipe.on_lora_kept,
        gradient_checkpointing=recipe.gradient_checkpointing,
        lola_config={**recipe.served(), **(sizes or {})},
    )


def calibrate_options(recipe: Recipe) -> CalibrateOptions:
    """Of both calibrations."""
    return CalibrateOptions(
        pairs=recipe.scored_pairs,
        least=recipe.calibration_least,
        recent=recipe.recent_pairs,
        prompts=recipe.calibration_prompts,
        prompt_length=recipe.calibration_prompt_length,
        facts=recipe.calibration_facts,
        dtype=cast(Any, recipe.dtype),
        seed=recipe.seed,
    )


def check(recipe: Recipe) -> None:
    """Refuse a recipe with rows in which nothing is folded.

    Raises:
        CheckpointError: names the option of the verb, its value and the least one that does.
    """
    from lola_vllm.training.distill.transfer import check_row_length

    first = lora_options(recipe)
    check_row_length("row_length", first.row_length, first.configs())
    check_row_length("lora_row_length", first.lora_row_length, first.configs())
    first.lora_lengths()
    on = on_options(recipe, {"sparse_cache_size": recipe.calibration_least})
    check_row_length("on_row_length", on.lora_row_length, on.configs())


def growing_rows(tokens: int, first: int, last: int) -> int:
    """Rows that have so many tokens together, as many of each length from `first` to `last`."""
    lengths = [first << i for i in range((last // first).bit_length())]
    each = tokens / len(lengths)
    return max(2 ** len(lengths) - 1, round(sum(each / length for length in lengths)))
