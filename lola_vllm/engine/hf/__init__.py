"""LoLA models in plain transformers: training, generation and comparison without vLLM.

Importing this package makes `AutoModelForCausalLM.from_pretrained` load LoLA checkpoints. A forward
with a cache runs the serving ops on state pages. A forward without a cache runs
`lola_vllm.core.ops.differentiable`, which has gradients and computes the same.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from lola_vllm.core.config import MODEL_TYPE, LolaLlamaConfig
from lola_vllm.engine.hf.cache import LolaCache
from lola_vllm.engine.hf.modeling import LolaLlamaForCausalLM, LolaLlamaModel
from lola_vllm.engine.hf.tokens import LolaModelError

AutoConfig.register(MODEL_TYPE, LolaLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(LolaLlamaConfig, LolaLlamaForCausalLM, exist_ok=True)

__all__ = [
    "LolaCache",
    "LolaLlamaConfig",
    "LolaLlamaForCausalLM",
    "LolaLlamaModel",
    "LolaModelError",
]
