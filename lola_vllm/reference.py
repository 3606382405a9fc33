"""The earlier name of `lola_vllm.ops.reference`, kept for code that imports it."""

from lola_vllm.ops.reference import *  # noqa: F403
