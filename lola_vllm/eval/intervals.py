"""Confidence intervals: of a share of successes, and of perplexities and their ratio."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
RESAMPLES = 2000


def wilson(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95 % by default.

    Unlike the normal approximation it stays within [0, 1] and has a width at 0 and at all.

    Raises:
        ValueError: no trial, or successes outside 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # At the ends the exact bound is 0 or 1; rounding must not leave it a hair away.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def exp_mean(
    nats: NDArray[np.float64], tokens: NDArray[np.float64], seed: int = 0
) -> tuple[float, float, float]:
    """exp(sum of nats / sum of tokens) over windows, with a bootstrap interval.

    With negative log-likelihoods this is perplexity. With differences of them, taken window by
    window, it is a ratio of perplexities, and the pairing takes the text's own variation out.

    Args:
        nats: `[W]`, one sum per window. tokens: `[W]`, tokens that were summed.
        seed: of the resampling over windows.

    Returns:
        Value, and the 2.5 and 97.5 percentiles of resampled values.

    Raises:
        ValueError: no window, or arrays of different lengths.
    """
    if len(nats) == 0 or nats.shape != tokens.shape:
        raise ValueError(f"{nats.shape} sums for {tokens.shape} counts of tokens")
    value = math.exp(nats.sum() / tokens.sum())
    picks = np.random.default_rng(seed).integers(0, len(nats), size=(RESAMPLES, len(nats)))
    means = nats[picks].sum(axis=1) / tokens[picks].sum(axis=1)
    low, high = np.exp(np.percentile(means, [2.5, 97.5]))
    return value, float(low), float(high)
