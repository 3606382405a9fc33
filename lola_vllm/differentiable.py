"""The first name of `lola_vllm.ops.differentiable`; imports of it go on working."""

from lola_vllm.ops.differentiable import *  # noqa: F403
