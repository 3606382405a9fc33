"""The counts of `lola-vllm estimate --gpu` beside a CPU: predicted and measured time of an op.

    OMP_PROC_BIND=true python benchmarks/cost_model.py --out eval-results/cost-model.json

A large copy gives the memory's bandwidth, and products of matrices the arithmetic, in the pages'
dtype and in float32. With them the same counts as for a GPU predict a decode step of one layer,
averaged over an update interval, and a prompt. Nothing is fitted. The ratio says how far the op is
from what the machine allows: 1 is a perfect op, or a count that lacks something.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from op_common import add_layer_options, medians_s
from ops import Case

from lola_vllm.eval import summary
from lola_vllm.gpu_cost.gpus import Gpu, Part
from lola_vllm.gpu_cost.steps import ALL_HEADS, HEAD, WEIGHTS, Model, decode, prefill
from lola_vllm.ops import PrefillBatch
from lola_vllm.state import LayerLayout, SequenceLayout


def machine(dtype: torch.dtype, seconds: float, copy_mib: int, side: int) -> Gpu:
    """This CPU as a data sheet of one processor: bandwidth and flops of all threads, measured."""
    source = torch.ones(copy_mib * 2**18)
    target = torch.empty_like(source)
    wide = torch.ones(side, side)
    own = wide.to(dtype)
    runs: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "own": lambda: own @ own,
        "wide": lambda: wide @ wide,
    }
    found = medians_s(runs, seconds, "cpu")
    products = 2.0 * side**3
    return Gpu(
        "this CPU", 0, 2 * source.nbytes / found["copy"], products / found["own"],
        products / found["wide"], 1, 0,
    )  # fmt: skip


def predicted_s(parts: Sequence[Part], cpu: Gpu) -> float:
    """Of the op alone. A CPU has no TF32: what is not in the model's dtype is float32."""
    return sum(
        dataclasses.replace(part, unit=part.unit if part.unit == "bf16" else "fp32").seconds(cpu)
        for part in parts
        if part.name not in (WEIGHTS, HEAD)
    )


def decode_s(case: Case, interval: int, turns: int) -> float:
    """Mean time of a step over update intervals."""
    best = float("inf")
    for _ in range(turns):
        case.reset()
        begin = time.perf_counter()
        steps = interval * len(case.groups)
        for _ in range(steps):
            case.advance()
        best = min(best, (time.perf_counter() - begin) / steps)
    return best


def prefill_s(case: Case, turns: int) -> float:
    """Of a prompt of as many tokens as the case's pages have seen."""
    tokens, best = case.start, float("inf")
    batch = PrefillBatch(torch.tensor([1]), torch.tensor([0, tokens]), torch.tensor([0]))
    inputs = [x[:tokens] for x in (case.q, case.k, case.v)]
    for _ in range(turns):
        begin = time.perf_counter()
        case.ops.prefill(case.state, *inputs, batch, case.out[:tokens])
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--lams", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--interval", type=int, default=16)
    parser.add_argument("--context", type=int, default=4096, help="tokens of pages and prompts")
    parser.add_argument("--turns", type=int, default=5, help="of which the fastest counts")
    parser.add_argument("--seconds", type=float, default=2.0, help="to measure the machine")
    parser.add_argument("--copy-mib", type=int, default=256)
    parser.add_argument("--side", type=int, default=1024, help="of the matrices")
    add_layer_options(parser, heads=9, kv_heads=3, state_heads=3, head_dim=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.device = "cpu"
    dtype = getattr(torch, args.dtype)
    cpu = machine(dtype, args.seconds, args.copy_mib, args.side)
    print(
        f"{cpu.bytes_per_s / 1e9:.1f} GB/s, {cpu.bf16_flops / 1e9:.0f} GFLOPS {args.dtype}, "
        f"{cpu.fp32_flops / 1e9:.0f} float32"
    )
    rows = []
    for lam in args.lams:
        for batch in args.batches:
            case = Case(args, batch, lam, args.interval)
            sequence = SequenceLayout((LayerLayout((case.layout,)),))
            model = Model(sequence, args.heads, 0, 0, dtype.itemsize, None)
            step = decode(model, cpu, batch, case.start, ALL_HEADS)
            rows.append(_row("decode", lam, batch, predicted_s(step.parts, cpu),
                             decode_s(case, args.interval, args.turns)))  # fmt: skip
        prompt = prefill(model, cpu, 1, case.start, ALL_HEADS)
        rows.append(_row("prompt", lam, 1, predicted_s(prompt.parts, cpu),
                         prefill_s(case, args.turns)))  # fmt: skip
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.out:
        settings = {key: str(value) for key, value in vars(args).items() if key != "out"}
        report = {"settings": settings, "machine": dataclasses.asdict(cpu), "results": rows}
        summary.write(args.out, report, "benchmarks/cost_model.py")


def _row(what: str, lam: int, batch: int, predicted: float, measured: float) -> dict[str, object]:
    return {
        "what": what,
        "lam": lam,
        "batch": batch,
        "predicted_us": round(predicted * 1e6, 1),
        "measured_us": round(measured * 1e6, 1),
        "predicted_over_measured": round(predicted / measured, 3),
    }


if __name__ == "__main__":
    main()
