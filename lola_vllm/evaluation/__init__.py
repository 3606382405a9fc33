"""`lola-vllm eval`: what a model recalls, and how well it predicts text, with and without LoLA.

This package serves no requests. Prompts depend only on a seed, so every setting of a comparison
answers the same questions.
"""


class EvalError(ValueError):
    """An evaluation that cannot run; the message names what is wrong, its value and the remedy."""
