"""The linears of a decoder with weights that stay bfloat16, beside vLLM's in float32.

    python benchmarks/linear.py --rows 1 2 8 32 1024

Milliseconds of all products of a step, the head's among them, best of some runs. What stays
bfloat16 is beside the time that a plain read of as many bytes takes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import vllm._custom_ops as vllm_ops
from common import ROOT, write_report

from lola_vllm.core.ops.linear import panels_of


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--layers", type=int, help="of the model's; default: all")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def shapes(model: Path, layers: int | None) -> list[tuple[int, int]]:
    """`[N, K]` of a Llama's linears as vLLM joins them, and of its head."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or hidden // heads
    layer = [((heads + 2 * kv_heads) * d, hidden), (hidden, heads * d), (2 * inner, hidden),
             (hidden, inner)]  # fmt: skip
    return layer * (layers or config["num_hidden_layers"]) + [(config["vocab_size"], hidden)]


def best(run: Callable[[], object], runs: int) -> float:
    """Milliseconds of the fastest run."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def main() -> None:
    """Measure and print."""
    args = parse()
    sizes = shapes(args.model, args.layers)
    weights = [(torch.randn(n, k) * 0.02).bfloat16().float() for n, k in sizes]
    handlers = [vllm_ops.create_onednn_mm(weight.t(), 32) for weight in weights]
    panels = [panels_of(weight) for weight in weights]
    read = torch.ones(sum(weight.numel() for weight in weights), dtype=torch.bfloat16)
    found: dict[str, dict[str, float]] = {"vLLM, float32": {}, "bfloat16": {}, "read": {}}
    words = read.view(torch.int64) if len(read) % 4 == 0 else read
    found["read"]["ms"] = best(lambda: words.max(), args.runs)
    for rows in args.rows:
        x = {k: torch.randn(rows, k) for _, k in sizes}
        pairs = [(x[k], handler, panel) for (_, k), handler, panel in zip(
            sizes, handlers, panels, strict=True)]  # fmt: skip
        found["vLLM, float32"][f"ms/{rows}"] = best(
            lambda pairs=pairs: [vllm_ops.onednn_mm(h, rows_of, None) for rows_of, h, _ in pairs],
            args.runs,
        )
        found["bfloat16"][f"ms/{rows}"] = best(
            lambda pairs=pairs: [
                torch.ops.lola.linear(rows_of, p, None) for rows_of, _, p in pairs
            ],
            args.runs,
        )
    for name, times in found.items():
        print(name, {key: round(value, 1) for key, value in times.items()})
    write_report(args, found)


if __name__ == "__main__":
    main()
