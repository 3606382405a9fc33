"""lola-vllm: LoLA attention (arXiv 2505.23666) for vLLM, in fixed memory per sequence.

vLLM calls `register()` in every process it starts. Importing this package loads neither vLLM nor
torch and touches no device; `register()` hands vLLM names, not classes, wherever it can.
"""

from __future__ import annotations

import logging

__version__ = "0.1.0"
__all__ = ["register"]


def register() -> None:
    """Make vLLM know LoLA models. Safe to call more than once in a process.

    Never raises, because vLLM would then fail for every other model too. An error is logged, and
    vLLM then refuses a LoLA model as unknown.
    """
    # vLLM configures handlers for its own loggers only; a child of `vllm` is shown with them.
    logger = logging.getLogger("vllm.lola")
    try:
        _register()
    except Exception as error:
        logger.error("lola-vllm is not active: %s", error, exc_info=not _expected(error))


def _expected(error: Exception) -> bool:
    from lola_vllm.engine.vllm.compat import UnsupportedVllmError

    return isinstance(error, UnsupportedVllmError)


def _register() -> None:
    import vllm
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from lola_vllm.core.config import DecoderConfig
    from lola_vllm.core.model_types import ARCHITECTURES
    from lola_vllm.engine.vllm import compat
    from lola_vllm.engine.vllm.config_hook import LolaModelConfig

    compat.check_vllm_version(vllm.__version__)
    DecoderConfig.register()
    MODELS_CONFIG_MAP.update(dict.fromkeys(ARCHITECTURES, LolaModelConfig))
    compat.register_length()
    compat.look_at_wake_ups()
    compat.register_mamba_backend("lola_vllm.engine.vllm.backend.LolaAttentionBackend")
    for name, module in ARCHITECTURES.items():
        ModelRegistry.register_model(name, f"lola_vllm.engine.vllm.{module}:{name}")
