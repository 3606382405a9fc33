"""A model's decode step and prompts on a GPU, beside stock attention: a table, and JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lola_vllm.config import LolaLlamaConfig
from lola_vllm.gpu_cost.gpus import GRAPH_LAUNCH_S, HOST_LAUNCH_S, Cost, Gpu, gpu_named
from lola_vllm.gpu_cost.steps import (
    DECODE_DESIGNS,
    PREFILL_DESIGNS,
    STOCK,
    Model,
    decode,
    prefill,
)
from lola_vllm.state import SequenceLayout

PREFILL_ROWS = (1, 64)  # prompts that are read at once
NOT_COUNTED = (
    "Computed from data sheets and launch counts, not measured. Norms, activations and the sampler "
    "are counted as launches alone."
)


@dataclass(frozen=True)
class GpuCost:
    """What `lola-vllm estimate --gpu` prints.

    Attributes:
        gpu: its data sheet. batch: sequences of the decode step. context: tokens of each, and of
            each prompt. weight_bytes, state_bytes, stock_bytes: of the weights, of a state and of
            a full KV cache of `context` tokens.
        decode: a step in each design. prefill: of each number of prompts, in each design.
    """

    gpu: Gpu
    batch: int
    context: int
    weight_bytes: int
    state_bytes: int
    stock_bytes: int
    decode: tuple[Cost, ...]
    prefill: dict[int, tuple[Cost, ...]]

    def memory_bytes(self, design: str) -> int:
        """Weights, and what the sequences of the decode step hold."""
        of_one = self.stock_bytes if design == STOCK else self.state_bytes
        return self.weight_bytes + self.batch * of_one

    def to_json(self) -> dict[str, Any]:
        """All numbers, ready for `json.dumps`."""
        return {
            "gpu": self.gpu.name,
            "batch": self.batch,
            "context": self.context,
            "graph_launch_seconds": GRAPH_LAUNCH_S,
            "host_launch_seconds": HOST_LAUNCH_S,
            "gpu_memory_bytes": self.gpu.memory_bytes,
            "decode": [
                cost.to_json(self.gpu) | {"memory_bytes": self.memory_bytes(cost.design)}
                for cost in self.decode
            ],
            "prefill": [
                {"rows": rows, **cost.to_json(self.gpu)}
                for rows, costs in self.prefill.items()
                for cost in costs
            ],
        }


def gpu_cost(
    config: LolaLlamaConfig, sequence: SequenceLayout, gpu: str, batch: int, context: int
) -> GpuCost:
    """Count a decode step and prompts of a model with all of its heads on one GPU.

    Args:
        sequence: the model's state. gpu: a name of `GPUS`. batch: sequences of the decode step.
        context: tokens of each, and of each prompt.

    Raises:
        ValueError: an unknown GPU, or a batch or context below 1; names the argument.
    """
    sheet = gpu_named(gpu)
    for name, value in (("batch", batch), ("context", context)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    model = Model.of(config, sequence)
    return GpuCost(
        sheet,
        batch,
        context,
        model.bytes,
        sequence.row_bytes,
        context * sequence.full_kv_bytes_per_token,
        tuple(decode(model, sheet, batch, context, design) for design in DECODE_DESIGNS),
        {
            rows: tuple(prefill(model, sheet, rows, context, design) for design in PREFILL_DESIGNS)
            for rows in PREFILL_ROWS
        },
    )


def format_cost(cost: GpuCost) -> str:
    """Two tables of times, by part and design."""
    gpu, tokens = cost.gpu, f"{cost.context:,} tokens"
    ceilings = (
        f"{gpu.name}: {gpu.bytes_per_s / 1e12:.2f} TB/s, {gpu.bf16_flops / 1e12:.0f} bfloat16 and "
        f"{gpu.fp32_flops / 1e12:.0f} float32 TFLOPS, {gpu.memory_bytes / 1e9:.0f} GB"
    )
    memory = ["memory, GB"]
    for step in cost.decode:
        used = cost.memory_bytes(step.design)
        memory.append(f"{used / 1e9:.1f}" + ("!" if used > gpu.memory_bytes else ""))
    rate = ["tokens/s", *(f"{cost.batch / step.seconds(gpu):,.0f}" for step in cost.decode)]
    lines = [ceilings, NOT_COUNTED, ""]
    title = f"decode, us: {cost.batch:,} x {tokens}"
    lines += _aligned([*_rows(title, cost.decode, gpu, lambda s: f"{s * 1e6:,.0f}"), rate, memory])
    if any(cell.endswith("!") for cell in memory):
        lines.append("! does not fit")
    for rows, prompts in cost.prefill.items():
        title = f"prompt, ms: {rows} x {tokens}"
        lines += ["", *_aligned(_rows(title, prompts, gpu, lambda s: f"{s * 1e3:,.1f}"))]
    return "\n".join(lines)


def _rows(
    title: str, costs: tuple[Cost, ...], gpu: Gpu, show: Callable[[float], str]
) -> list[list[str]]:
    names = dict.fromkeys(part.name for cost in costs for part in cost.parts)
    rows = [[title, *(cost.design for cost in costs)]]
    for name in names:
        found = [{part.name: part for part in cost.parts}.get(name) for cost in costs]
        rows.append([f"  {name}", *("" if p is None else show(p.seconds(gpu)) for p in found)])
    rows.append(["  launches", *(show(cost.launch_seconds) for cost in costs)])
    rows.append(["total", *(show(cost.seconds(gpu)) for cost in costs)])
    rows.append(["launches, number", *(f"{cost.launches:,.0f}" for cost in costs)])
    rows.append(["GB read and written", *(f"{cost.bytes / 1e9:,.2f}" for cost in costs)])
    rows.append(["TFLOP", *(f"{cost.flops / 1e12:,.3f}" for cost in costs)])
    return rows


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
