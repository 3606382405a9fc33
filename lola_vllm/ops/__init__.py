"""LoLA's ops: one contract (`contract.py`), several back ends, chosen once at start-up."""

from lola_vllm.ops.contract import Backend, LolaWeights

__all__ = ["Backend", "LolaWeights"]
