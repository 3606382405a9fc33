"""Which back end serves a device: decided once per process, logged, forced by LOLA_VLLM_OPS."""

from __future__ import annotations

import functools
import logging
import os
from functools import partial

from lola_vllm.ops import native
from lola_vllm.ops import torch as portable
from lola_vllm.ops.contract import Backend

logger = logging.getLogger("vllm.lola")

ENV = "LOLA_VLLM_OPS"
NAMES = ("auto", "torch", "native")


@functools.cache
def choose_backend(device_type: str) -> Backend:
    """The back end for a device.

    Args:
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: `LOLA_VLLM_OPS` names no back end, or one that is not built for this device.
    """
    wanted = os.environ.get(ENV, "auto")
    if wanted not in NAMES:
        raise ValueError(f"{ENV} = {wanted!r}: must be one of {', '.join(NAMES)}")
    has_native = device_type == "cpu" and wanted != "torch" and native.load()
    if wanted == "native" and not has_native:
        raise ValueError(
            f"{ENV} = 'native': the C++ extension is not built for {device_type}; run "
            "'pip install --no-build-isolation -e .' with g++ installed, or unset it"
        )
    if has_native:
        sre = native.sre_scores
        backend = Backend(
            "native (C++ rescoring, torch attention)",
            decode=partial(portable.decode, sre=sre),
            prefill=partial(portable.prefill, sre=sre),
        )
    else:
        backend = Backend("torch", decode=portable.decode, prefill=portable.prefill)
    logger.info("LoLA ops on %s: %s", device_type, backend.name)
    return backend
