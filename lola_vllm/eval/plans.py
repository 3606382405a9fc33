"""The plans that a setting can be given, by name."""

from __future__ import annotations

from typing import TypeAlias

from lola_vllm.eval.perplexity import PerplexityPlan
from lola_vllm.eval.recall import RecallPlan

Plan: TypeAlias = RecallPlan | PerplexityPlan
PLANS: dict[str, type[RecallPlan] | type[PerplexityPlan]] = {
    "recall": RecallPlan,
    "perplexity": PerplexityPlan,
}


def plan_name(plan: Plan) -> str:
    """The name of a plan's kind."""
    return next(name for name, kind in PLANS.items() if isinstance(plan, kind))
