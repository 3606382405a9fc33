"""LoLA's ops: one contract (`contract.py`), several back ends, chosen once at start-up."""

from lola_vllm.ops.contract import (
    Backend,
    DecodeBatch,
    HeadStates,
    LayerState,
    LolaWeights,
    PrefillBatch,
    State,
    bind_layer,
)
from lola_vllm.ops.select import choose_backend

__all__ = [
    "Backend",
    "DecodeBatch",
    "HeadStates",
    "LayerState",
    "LolaWeights",
    "PrefillBatch",
    "State",
    "bind_layer",
    "choose_backend",
]
