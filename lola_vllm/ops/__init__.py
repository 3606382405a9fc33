"""LoLA's ops: one contract (`contract.py`), several back ends, chosen once at start-up."""

from lola_vllm.ops.contract import Backend, LolaWeights
from lola_vllm.ops.select import choose_backend

__all__ = ["Backend", "LolaWeights", "choose_backend"]
