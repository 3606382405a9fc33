"""The linears of a decoder with weights that stay bfloat16, beside vLLM's in float32.

    python benchmarks/linear.py --rows 1 2 8 32 1024

Milliseconds of all products of a step, the head's among them, best of some runs. What stays
bfloat16 is beside the time that a plain read of as many bytes takes.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import vllm._custom_ops as vllm_ops
from common import ROOT, parser_of, write_report

from lola_vllm.core.ops.linear import panels_of


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--runs", type=int, default=9)
    return parser.parse_args()


def shapes(model: Path) -> list[tuple[int, int]]:
    """`[N, K]` of a Llama's linears as vLLM joins them, and of its head."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or hidden // heads
    layer = [((heads + 2 * kv_heads) * d, hidden), (hidden, heads * d), (2 * inner, hidden),
             (hidden, inner)]  # fmt: skip
    return layer * config["num_hidden_layers"] + [(config["vocab_size"], hidden)]


def best(run: Callable[[], object], runs: int) -> float:
    """Milliseconds of the fastest run."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def step(products: list[tuple[int, Callable[..., object]]], rows: int) -> Callable[[], object]:
    """All products of a step, of random rows `[rows, K]`; each stands behind its K."""
    x = {k: torch.randn(rows, k) for k, _ in products}
    return lambda: [product(x=x[k]) for k, product in products]


def main() -> None:
    """Measure and print."""
    args = parse()
    ways: dict[str, list[tuple[int, Callable[..., object]]]] = {"vLLM, float32": [], "bfloat16": []}
    numbers = 0
    for n, k in shapes(args.model):
        weight = (torch.randn(n, k) * 0.02).bfloat16().float()
        handler = vllm_ops.create_onednn_mm(weight.t(), 32)
        plain = functools.partial(vllm_ops.onednn_mm, handler, bias=None)
        ways["vLLM, float32"].append((k, plain))
        panels = panels_of(weight)  # loads the op
        ours = functools.partial(torch.ops.lola.linear, panels=panels, bias=None)
        ways["bfloat16"].append((k, ours))
        numbers += n * k
    found = {
        name: {f"ms/{rows}": best(step(products, rows), args.runs) for rows in args.rows}
        for name, products in ways.items()
    }
    found["read"] = {"ms": best(torch.ones(numbers // 4, dtype=torch.int64).max, args.runs)}
    for name, times in found.items():
        print(name, {key: round(value, 1) for key, value in times.items()})
    write_report(args, found)


if __name__ == "__main__":
    main()
