"""The first name of `lola_vllm.ops.reference`; imports of it go on working."""

from lola_vllm.ops.reference import *  # noqa: F403
