"""Tokens per second of one layer's prefill op, back ends beside each other in turns.

    python benchmarks/prefill.py --out benchmarks/results/prefill.json
    python benchmarks/prefill.py --device cuda --backends triton xformers

Prompts start from empty pages. Shapes default to Llama-3.1-8B's (Hq 32, Hkv 8, d 128, window and
update interval 64), pages in bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import write_report

from lola_vllm.config import LolaConfig
from lola_vllm.ops import Backend, LolaWeights, choose_backend
from lola_vllm.ops.select import ENV
from lola_vllm.state import StateLayout

BACKENDS = {"cpu": ["native", "torch"], "cuda": ["triton", "xformers"]}


def forced(name: str, device: str, dtype: torch.dtype) -> Backend:
    """The back end of a name, which `LOLA_VLLM_OPS` would choose."""
    os.environ[ENV] = name
    choose_backend.cache_clear()
    return choose_backend(device, dtype)


def prompts(args: argparse.Namespace, tokens: int, rows: int) -> Callable[[Backend], None]:
    """A call of prefill on `rows` prompts of `tokens` tokens, the same at every call."""
    config = LolaConfig(
        window_size=args.window,
        sparse_cache_size=args.lam,
        update_interval=args.interval,
        feature_dim=args.feature_dim,
    )
    Hq, Hkv, Hs = args.heads, args.kv_heads, args.state_heads
    d, dtype, device = args.head_dim, getattr(torch, args.dtype), torch.device(args.device)
    layout = StateLayout.from_config(config, Hkv, Hs, d, dtype)
    pool = torch.zeros(rows + 1, layout.page_bytes, dtype=torch.uint8, device=device)
    views = layout.views(pool)
    gen = torch.Generator().manual_seed(0)
    maps = [torch.randn(h, d, args.feature_dim, generator=gen) * 0.3 for h in (Hq, Hs)]
    weights = LolaWeights.prepare(
        *(m.to(device) for m in maps), torch.full((Hq,), -2.2, device=device), "lola"
    )
    # As in the model, queries, keys and values are parts of one product's rows.
    product = torch.randn(rows * tokens, Hq + 2 * Hkv, d, generator=gen).to(device, dtype)
    q, k, v = product.split([Hq, Hkv, Hkv], dim=1)
    out = torch.empty(rows * tokens, Hq, d, dtype=dtype, device=device)
    slots = torch.arange(1, rows + 1, dtype=torch.int32, device=device)
    starts = torch.arange(rows + 1, dtype=torch.int32) * tokens
    context = torch.zeros(rows, dtype=torch.int32)

    def call(backend: Backend) -> None:
        backend.prefill(q, k, v, weights, layout, views, slots, starts, context, out)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call


def measure(
    args: argparse.Namespace, backends: dict[str, Backend], tokens: int, rows: int
) -> dict[str, float]:
    """Tokens per second of each back end, the median of its turns, and its part of the first's."""
    call = prompts(args, tokens, rows)
    for backend in backends.values():
        call(backend)  # compiles
    times: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(args.turns):
        for name, backend in backends.items():
            begin = time.perf_counter()
            call(backend)
            times[name].append(time.perf_counter() - begin)
    speed = {name: rows * tokens / statistics.median(found) for name, found in times.items()}
    first, *others = speed
    return {
        "tokens": tokens,
        "rows": rows,
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
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--lam", type=int, default=512)
    parser.add_argument("--interval", type=int, default=64)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--state-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--feature-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.backends = args.backends or BACKENDS[args.device]
    dtype = getattr(torch, args.dtype)
    backends = {name: forced(name, args.device, dtype) for name in args.backends}
    rows = []
    for tokens, count in itertools.product(args.tokens, args.rows):
        rows.append(measure(args, backends, tokens, count))
        if len(rows) == 1:
            print("".join(f"{key:>24}" for key in rows[0]))
        print("".join(f"{value:24.2f}" for value in rows[-1].values()), flush=True)
    write_report(args, {"prefill": rows})


if __name__ == "__main__":
    main()
