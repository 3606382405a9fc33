"""How much of a machine's memory states may take, and how many sequences fit in it.

The config hook asks when vLLM starts. Imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

GIB = 2**30
# Memory of Python, torch and vLLM: API server, engine and first rank; each further rank.
SERVER_BYTES = 3 * GIB
RANK_BYTES = GIB
# Memory of Python, torch, vLLM, activations and CUDA graphs on a GPU.
GPU_BYTES = 3 * GIB


class Pool(NamedTuple):
    """The states of a rank.

    Attributes:
        state_bytes: of one. per_sequence: states that a sequence needs.
    """

    state_bytes: int
    per_sequence: int

    @classmethod
    def of(cls, state_bytes: int, device: str, caching: bool) -> Pool:
        """The pool on a device, "cpu" or "cuda", with prefix caching or without.

        With prefix caching a running sequence has its own state and the last one at a block
        boundary. On a CPU there is one more per sequence, for prefixes that may come again.
        """
        per_sequence = (3 if device == "cpu" else 2) if caching else 1
        return cls(state_bytes, per_sequence)

    def bytes_for(self, sequences: int) -> int:
        """Bytes for so many sequences; one more state is vLLM's null block."""
        return (self.per_sequence * sequences + 1) * self.state_bytes

    def sequences_in(self, room: int) -> int:
        """Sequences that fit in so many bytes; 0 or less where none does."""
        return (room // self.state_bytes - 1) // self.per_sequence


def weight_bytes(files: int, config: Mapping[str, Any], dtype: str) -> int:
    """Bytes of a model's weights in memory.

    Args:
        files: bytes of its weight files. config: its `config.json`. dtype: that it runs in.
    """
    sizes = {"float16": 2, "bfloat16": 2, "float32": 4}
    stored = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if "quantization_config" in config or not {stored, dtype} <= set(sizes):
        return files
    return files * sizes[dtype] // sizes[stored]


def cpu_room(free: int, weights: int, ranks: int = 1, stored: int = 0) -> int:
    """Bytes that the states of one rank may take on a CPU.

    All ranks of a machine together take at most half of what weights and processes leave of the
    free memory, so that the machine stays usable. Stored states are in the other half, and more of
    them reduce the first.

    Args:
        free: memory that is free before the server starts, in bytes.
        weights: bytes of the weights, all ranks of this machine together.
        ranks: vLLM's workers on this machine. stored: bytes for stored states.
    """
    left = free - weights - SERVER_BYTES - (ranks - 1) * RANK_BYTES
    return max(0, min(left // 2, left - stored)) // ranks


def gpu_room(memory: int, utilization: float, weights: int) -> int:
    """Bytes that the states of one rank may take on a GPU; negative where nothing is left.

    Args:
        memory: of the GPU, in bytes. utilization: as `--gpu-memory-utilization`.
        weights: bytes of the weights of the rank.
    """
    return int(memory * utilization) - weights - GPU_BYTES
