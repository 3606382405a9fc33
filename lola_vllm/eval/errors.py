"""The one error that the user of `lola-vllm eval` can mend."""

from __future__ import annotations


class EvalError(ValueError):
    """An evaluation that cannot run; the message names what is wrong, its value and the remedy."""
