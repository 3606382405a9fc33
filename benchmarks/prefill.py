"""Tokens per second of one layer's prefill op, back ends beside each other in turns.

    python benchmarks/prefill.py --out eval-results/prefill.json
    python benchmarks/prefill.py --device cuda --backends triton xformers

Prompts start from empty pages, or continue sequences of `--contexts` tokens. Shapes default to
Llama-3.1-8B's (Hq 32, Hkv 8, d 128, window and update interval 64), pages in bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from common import write_report
from op_common import add_layer_options, make_layer, medians_s

from lola_vllm.core.ops import Backend, LayerState, PrefillBatch, choose_backend
from lola_vllm.core.ops.select import ENV
from lola_vllm.core.state import LayerLayout

BACKENDS = {"cpu": ["cpp", "torch"], "cuda": ["triton", "xformers"]}


def forced(name: str, device: str, dtype: torch.dtype) -> Backend:
    """The back end of a name, which `LOLA_VLLM_OPS` would choose."""
    os.environ[ENV] = name
    choose_backend.cache_clear()
    return choose_backend(device, dtype)


def prompts(
    args: argparse.Namespace, tokens: int, rows: int, context: int
) -> Callable[[Backend], None]:
    """A call of prefill on `rows` prompts of `tokens` tokens after `context` others, the same at
    every call: pages are as they were then, which takes a copy of them."""
    gen = torch.Generator().manual_seed(0)
    layout, weights = make_layer(args, args.lam, args.interval, gen)
    Hq, Hkv, d = args.heads, args.kv_heads, args.head_dim
    dtype, device = layout.kv_dtype, torch.device(args.device)
    pool = torch.zeros(rows + 1, layout.page_bytes, dtype=torch.uint8, device=device)
    state = LayerState.bind(weights, LayerLayout((layout,)), pool)
    # As in the model, queries, keys and values are parts of one product's rows.
    most = rows * max(tokens, context)
    product = torch.randn(most, Hq + 2 * Hkv, d, generator=gen).to(device, dtype)
    out = torch.empty(most, Hq, d, dtype=dtype, device=device)

    def read(backend: Backend, length: int, after: int) -> None:
        q, k, v = product[: rows * length].split([Hq, Hkv, Hkv], dim=1)
        batch = PrefillBatch(
            torch.arange(1, rows + 1, dtype=torch.int32, device=device),
            torch.arange(rows + 1, dtype=torch.int32) * length,
            torch.full((rows,), after, dtype=torch.int32),
        )
        backend.prefill(state, q, k, v, batch, out[: rows * length])

    before: dict[str, torch.Tensor] = {}

    def call(backend: Backend) -> None:
        if context and backend.name not in before:
            pool.zero_()
            read(backend, context, 0)
            before[backend.name] = pool.clone()
        if context:
            pool.copy_(before[backend.name])
        read(backend, tokens, context)

    return call


def measure(
    args: argparse.Namespace, backends: dict[str, Backend], tokens: int, rows: int, context: int
) -> dict[str, float]:
    """Tokens per second of each back end, the median of its turns, and its part of the first's."""
    call = prompts(args, tokens, rows, context)
    runs = {name: functools.partial(call, backend) for name, backend in backends.items()}
    found = medians_s(runs, args.seconds, args.device)
    speed = {name: rows * tokens / took for name, took in found.items()}
    first, *others = speed
    return {
        "tokens": tokens,
        "rows": rows,
        "context": context,
        **{f"{name}_tokens_per_s": value for name, value in speed.items()},
        **{f"{name}_of_{first}": speed[name] / speed[first] for name in others},
    }


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(BACKENDS), default="cpu")
    parser.add_argument("--backends", nargs="+", help=f"default: {BACKENDS}")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="per prompt")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="prompts in a batch")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[0, 4096], help="tokens before the prompts"
    )
    parser.add_argument("--lam", type=int, default=512)
    parser.add_argument("--interval", type=int, default=64)
    add_layer_options(parser, heads=32, kv_heads=8, state_heads=8, head_dim=128)
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.backends = args.backends or BACKENDS[args.device]
    dtype = getattr(torch, args.dtype)
    backends = {name: forced(name, args.device, dtype) for name in args.backends}
    rows = []
    for each in itertools.product(args.tokens, args.rows, args.contexts):
        rows.append(measure(args, backends, *each))
        if len(rows) == 1:
            print("".join(f"{key:>24}" for key in rows[0]))
        print("".join(f"{value:24.2f}" for value in rows[-1].values()), flush=True)
    write_report(args, {"prefill": rows})


if __name__ == "__main__":
    main()
