"""The earlier name of `lola_vllm.ops.differentiable`, kept for code that imports it."""

from lola_vllm.ops.differentiable import *  # noqa: F403
