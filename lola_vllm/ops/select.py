"""Which back end serves a device: decided once per process, logged, forced by LOLA_VLLM_OPS."""

from __future__ import annotations

import functools
import logging
import os

import torch

from lola_vllm.ops import native
from lola_vllm.ops import torch as portable
from lola_vllm.ops.contract import Backend

logger = logging.getLogger("vllm.lola")

ENV = "LOLA_VLLM_OPS"
NAMES = ("auto", "torch", "native")


@functools.cache
def choose_backend(device_type: str, dtype: torch.dtype) -> Backend:
    """The back end for a device and a dtype of keys and values.

    Args:
        device_type: "cpu" or "cuda".
        dtype: the model's; the C++ ops know float32 and bfloat16.

    Raises:
        ValueError: `LOLA_VLLM_OPS` names no back end, or one that cannot serve here.
    """
    wanted = os.environ.get(ENV, "auto")
    if wanted not in NAMES:
        raise ValueError(f"{ENV} = {wanted!r}: must be one of {', '.join(NAMES)}")
    fits = device_type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    built = wanted != "torch" and fits and native.load()
    if wanted == "native" and not built:
        raise ValueError(
            f"{ENV} = 'native': the C++ ops run float32 and bfloat16 models on a CPU, not {dtype} "
            f"on {device_type}; unset it"
            if not fits
            else f"{ENV} = 'native': the C++ extension is not built; run "
            "'pip install --no-build-isolation -e .' with g++ installed, or unset it"
        )
    if built:
        backend = Backend(f"native ({native.cpu_isa()})", native.decode, native.prefill)
    else:
        backend = Backend("torch", portable.decode, portable.prefill)
    logger.info("LoLA ops on %s: %s", device_type, backend.name)
    return backend
