"""Which back end serves a device: decided once per process, logged, forced by LOLA_VLLM_OPS."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable

import torch

from lola_vllm.core.ops import cpp, portable
from lola_vllm.core.ops.contract import Backend

logger = logging.getLogger("vllm.lola")

ENV = "LOLA_VLLM_OPS"
NAMES = ("auto", "torch", "cpp", "triton", "cuda", "xformers")
# Who serves in the place of a back end that failed its self-check (`self_check.py`).
NEXT = {"cpp": "torch", "cuda": "triton", "xformers": "triton", "triton": "torch"}

_failed: set[str] = set()  # in this process


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
    if wanted == "auto":
        order = [name for name in _makers() if name not in _failed]
    else:
        chosen = _makers()[wanted](device_type, dtype)
        if isinstance(chosen, str):
            raise ValueError(f"{ENV} = {wanted!r}: {chosen}; or unset it")
        order = [name for name in _from(wanted) if name not in _failed]
    made = (_makers()[name](device_type, dtype) for name in order)
    backend = next(b for b in made if isinstance(b, Backend))
    logger.info("LoLA ops on %s: %s", device_type, backend.name)
    return backend


def next_backend(failed: Backend, device_type: str, dtype: torch.dtype) -> Backend:
    """What serves in the place of a back end, from now on and in the whole process."""
    _failed.add(failed.name.split()[0])
    choose_backend.cache_clear()
    return choose_backend(device_type, dtype)


def backends(device_type: str, dtype: torch.dtype) -> list[Backend]:
    """All that this machine has for a device, in the order in which they are chosen."""
    made = (make(device_type, dtype) for make in _makers().values())
    return [backend for backend in made if isinstance(backend, Backend)]


def _makers() -> dict[str, Callable[[str, torch.dtype], Backend | str]]:
    return {
        "cpp": _cpp,
        "triton": _triton,
        "torch": _torch,
        # After what always serves, so never chosen or imported unasked: no GPU has measured them
        # yet (benchmarks/gpu.sh).
        "cuda": _cuda,
        "xformers": _xformers,
    }


def _from(name: str) -> list[str]:
    """A back end and those that serve in its place, in order."""
    names = [name]
    while names[-1] in NEXT:
        names.append(NEXT[names[-1]])
    return names


def _cpp(device_type: str, dtype: torch.dtype) -> Backend | str:
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ ops run float32 and bfloat16 on a CPU, not {dtype} on {device_type}"
    if not cpp.load():
        return (
            "the C++ extension is not built; run 'pip install --no-build-isolation -e .' with "
            "g++ installed"
        )
    return Backend(f"cpp ({cpp.cpu_isa()})", cpp.decode, cpp.prefill)


def _torch(device_type: str, dtype: torch.dtype) -> Backend | str:
    return Backend("torch", portable.decode, portable.prefill)


def _triton(device_type: str, dtype: torch.dtype) -> Backend | str:
    if device_type != "cuda" or dtype == torch.float64:
        return f"the Triton kernels run on CUDA devices, not {dtype} on {device_type}"
    try:
        from lola_vllm.kernels import backend as kernels
        from lola_vllm.kernels.shift import shift_layers
        from lola_vllm.kernels.warmup import warm_up
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install triton"
    return Backend(
        "triton", kernels.decode, kernels.prefill, warm_up, shift_layers, capturable=True
    )


def _cuda(device_type: str, dtype: torch.dtype) -> Backend | str:
    kernels = _triton(device_type, dtype)
    if isinstance(kernels, str):
        return kernels
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not (cpp.load() and has_kernel("lola::decode", "CUDA")):
        return (
            "the CUDA ops are not built; install with nvcc and a CUDA build of torch at hand, "
            "without build isolation"
        )
    return Backend(
        "cuda", cpp.decode, kernels.prefill, kernels.warm_up, kernels.shift, capturable=True
    )


def _xformers(device_type: str, dtype: torch.dtype) -> Backend | str:
    kernels = _triton(device_type, dtype)
    if isinstance(kernels, str):
        return kernels
    if dtype not in (torch.float16, torch.bfloat16):
        return f"xformers' kernels take float16 and bfloat16, not {dtype}"
    try:
        from lola_vllm.kernels import xformers_prefill
    except ImportError as error:
        return f"xformers cannot be imported ({error}); pip install 'lola-vllm[xformers]'"
    reason = xformers_prefill.missing()
    if reason is not None:
        return reason
    return Backend(
        "xformers", kernels.decode, xformers_prefill.prefill, xformers_prefill.warm_up,
        kernels.shift, capturable=True,
    )  # fmt: skip
