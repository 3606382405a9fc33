"""LoLA checkpoints: a strict safetensors directory in the Hugging Face layout.

`schema` has the names and shapes of tensors, and `files` reads their headers. `staging` writes a
directory completely or not at all. `init`, `convert`, `demo` and `quantize` write checkpoints.
Importing this package loads neither torch nor vLLM.
"""

from lola_vllm.models.files import CheckpointError
from lola_vllm.models.schema import check_tensors, expected_tensors, read_facts

__all__ = ["CheckpointError", "check_tensors", "expected_tensors", "read_facts"]
