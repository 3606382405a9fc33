"""The evaluation of a new model beside its base, resumable like any other."""

from __future__ import annotations

from pathlib import Path

from lola_vllm.command.linearize.recipe import Recipe


def measure(
    base: Path, model: Path, texts: Path, recipe: Recipe, out: Path, batch: int
) -> list[str]:
    """Recall and perplexity, as far as the recipe has samples and windows.

    Args:
        texts: to hide needles in and to predict; held-out documents are read.
        out: of the results, a directory for each evaluation. batch: sequences at once.

    Returns:
        A table of each evaluation.

    Raises:
        EvalError: a setting that fails, or texts without held-out documents.
    """
    from lola_vllm.evaluation.comparison import evaluate
    from lola_vllm.evaluation.perplexity import PerplexityPlan
    from lola_vllm.evaluation.plan import Plan
    from lola_vllm.evaluation.recall import RecallPlan
    from lola_vllm.evaluation.settings import REFERENCE, Setting

    plans: list[Plan] = []
    asked = recipe.evaluate
    if asked.samples:
        plans.append(
            RecallPlan(
                tasks=list(asked.tasks),
                lengths=list(asked.lengths),
                samples=asked.samples,
                texts=str(texts),
            )
        )
    if asked.windows:
        plans.append(
            PerplexityPlan(
                texts=str(texts),
                windows=asked.windows,
                window_length=asked.window_length,
            )
        )
    settings = [Setting(REFERENCE, base), Setting("model", model)]
    return [evaluate(plan, settings, out / plan.name, batch=batch, resume=True) for plan in plans]
