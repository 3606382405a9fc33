"""LoLA checkpoints: a strict safetensors directory in the Hugging Face layout.

`schema` says which tensors there are, `files` reads their headers, `staging` makes writing all or
nothing, `init` and `demo` write checkpoints. Importing this package loads neither torch nor vLLM.
"""

from lola_vllm.checkpoint.files import CheckpointError
from lola_vllm.checkpoint.schema import check_tensors, expected_tensors, find_num_state_heads

__all__ = ["CheckpointError", "check_tensors", "expected_tensors", "find_num_state_heads"]
