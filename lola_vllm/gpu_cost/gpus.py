"""GPUs by their public data sheets, and the time that bandwidth, arithmetic and launches allow.

A roofline (Williams, Waterman and Patterson, 2009) for each part of a step. Two limits come on
top: the host's time for launches, and the longest chain of work that a single processor must do in
order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# Assumptions, which no run has checked. The host starts a kernel in about 10 us from Python; in a
# replayed CUDA graph one kernel follows another after about 4 us.
GRAPH_LAUNCH_S, HOST_LAUNCH_S = 4e-6, 10e-6
# A single processor reads at most this many times its share of the memory's bandwidth. H100: a
# processor takes 64 bytes a cycle from L2 at 1.7 GHz, 109 GB/s, and its share is 25 GB/s.
PROCESSOR_BANDWIDTH = 4
# Between two chunks of a loop within a launch: some barriers of a block, and as many round trips to
# memory (0.6 us each) that depend on each other.
CHAIN_STEP_S = 3e-6

Unit = Literal["bf16", "tf32", "tf32x3", "fp32"]


@dataclass(frozen=True)
class Gpu:
    """A data sheet.

    Attributes:
        name: in full. memory_bytes, l2_bytes: sizes. bytes_per_s: of memory.
        bf16_flops: per second, dense, of tensor cores that sum in float32. fp32_flops: outside of
            tensor cores. processors: streaming multiprocessors.
    """

    name: str
    memory_bytes: float
    bytes_per_s: float
    bf16_flops: float
    fp32_flops: float
    processors: int
    l2_bytes: float

    def rate(self, unit: Unit) -> float:
        """Flops per second. On all of these GPUs TF32 has half of bfloat16's; "tf32x3" is three
        TF32 products for one of float32's accuracy."""
        halves = {"bf16": 1.0, "tf32": 1 / 2, "tf32x3": 1 / 6}
        return self.fp32_flops if unit == "fp32" else self.bf16_flops * halves[unit]


GPUS = {
    # NVIDIA H100 data sheet, SXM5 (1,979 bfloat16 TFLOPS with sparsity); L2 and processors: NVIDIA
    # H100 Tensor Core GPU Architecture.
    "h100": Gpu("H100 SXM", 80e9, 3.35e12, 989e12, 67e12, 132, 50e6),
    # NVIDIA A100 80GB data sheet, SXM; NVIDIA A100 Tensor Core GPU Architecture.
    "a100": Gpu("A100 80GB SXM", 80e9, 2.039e12, 312e12, 19.5e12, 108, 40e6),
    # NVIDIA L4 data sheet (242 bfloat16 TFLOPS with sparsity); NVIDIA Ada GPU Architecture (AD104).
    "l4": Gpu("L4", 24e9, 300e9, 121e12, 30.3e12, 58, 48e6),
    # NVIDIA Ada GPU Architecture, appendix A: with float32 sums, dense.
    "4090": Gpu("RTX 4090", 24e9, 1.008e12, 165.2e12, 82.6e12, 128, 72e6),
}


def gpu_named(name: str) -> Gpu:
    """That of `GPUS`, whatever the case of its letters.

    Raises:
        ValueError: there is none of that name; lists the names.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise ValueError(f"gpu = {name!r}: must be one of {', '.join(GPUS)}")
    return found


@dataclass(frozen=True)
class Chain:
    """What one processor must do in order, however many others are idle.

    Attributes:
        flops, bytes: of it. steps: waits between its parts, `CHAIN_STEP_S` each.
    """

    flops: float = 0.0
    bytes: float = 0.0
    steps: float = 0.0


@dataclass(frozen=True)
class Part:
    """A part of a step, for all sequences and layers.

    Attributes:
        name: of it. bytes: to and from memory. flops: 2 for each product that is added. unit: what
            does them. chain: what of it cannot be spread.
    """

    name: str
    bytes: float
    flops: float
    unit: Unit = "bf16"
    chain: Chain = field(default_factory=Chain)

    def seconds(self, gpu: Gpu) -> float:
        """The largest of the times that bandwidth, arithmetic and the chain take."""
        share, chain = gpu.rate(self.unit) / gpu.processors, self.chain
        one = PROCESSOR_BANDWIDTH * gpu.bytes_per_s / gpu.processors
        chained = max(chain.flops / share, chain.bytes / one) + chain.steps * CHAIN_STEP_S
        return max(self.bytes / gpu.bytes_per_s, self.flops / gpu.rate(self.unit), chained)


@dataclass(frozen=True)
class Cost:
    """A step or a prompt in one design.

    Attributes:
        design: its name. parts: what it does. graph_launches, host_launches: kernels that a CUDA
            graph starts, and those that the host starts.
    """

    design: str
    parts: tuple[Part, ...]
    graph_launches: float
    host_launches: float

    @property
    def launches(self) -> float:
        """Kernels in all."""
        return self.graph_launches + self.host_launches

    @property
    def launch_seconds(self) -> float:
        """What starting them takes."""
        return self.graph_launches * GRAPH_LAUNCH_S + self.host_launches * HOST_LAUNCH_S

    @property
    def bytes(self) -> float:
        """Of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def flops(self) -> float:
        """Of all parts."""
        return sum(part.flops for part in self.parts)

    def seconds(self, gpu: Gpu) -> float:
        """All parts one after the other, and the launches."""
        return sum(part.seconds(gpu) for part in self.parts) + self.launch_seconds

    def to_json(self, gpu: Gpu) -> dict[str, object]:
        """Bytes, flops, launches and seconds, ready for `json.dumps`."""
        return {
            "design": self.design,
            "seconds": self.seconds(gpu),
            "launches": self.launches,
            "launch_seconds": self.launch_seconds,
            "bytes": self.bytes,
            "flops": self.flops,
            "parts": {
                part.name: {
                    "bytes": part.bytes,
                    "flops": part.flops,
                    "unit": part.unit,
                    "seconds": part.seconds(gpu),
                }
                for part in self.parts
            },
        }
