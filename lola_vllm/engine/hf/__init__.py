"""LoLA models in plain transformers: training, generation and comparison without vLLM.

Importing this package makes `AutoModelForCausalLM.from_pretrained` load LoLA checkpoints. A forward
with a cache runs the serving ops on state pages. A forward without a cache runs
`lola_vllm.core.ops.differentiable`, which has gradients and computes the same.
"""

from lola_vllm.core.config import DecoderConfig
from lola_vllm.engine.hf.cache import LolaCache
from lola_vllm.engine.hf.modeling import LolaForCausalLM
from lola_vllm.engine.hf.tokens import LolaModelError

DecoderConfig.register()

__all__ = ["DecoderConfig", "LolaCache", "LolaForCausalLM", "LolaModelError"]
