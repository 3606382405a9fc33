"""LoLA's ops: one contract (`contract.py`), several back ends, chosen once at start-up."""

from lola_vllm.core.ops.contract import (
    Backend,
    DecodeBatch,
    HeadGroup,
    LayerState,
    LolaWeights,
    PrefillBatch,
)
from lola_vllm.core.ops.select import choose_backend

__all__ = [
    "Backend",
    "DecodeBatch",
    "HeadGroup",
    "LayerState",
    "LolaWeights",
    "PrefillBatch",
    "choose_backend",
]
