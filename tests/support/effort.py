"""Short form and long form: how much the reliability tests try."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# `make test` runs the short form, the same cases every time. LOLA_VLLM_LONG=1 runs the long one,
# which draws new cases at every run and prints the one that failed.
LONG = os.environ.get("LOLA_VLLM_LONG", "0") not in ("", "0")


def cases(short: int, long: int) -> settings:
    """Hypothesis settings for a test that tries so many cases."""
    return settings(
        max_examples=long if LONG else short,
        derandomize=not LONG,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
