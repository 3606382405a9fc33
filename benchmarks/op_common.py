"""What the benchmarks of ops share: a layer with random weights, and times taken in turns."""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import torch

from lola_vllm.core.config import LolaConfig
from lola_vllm.core.ops import LolaWeights
from lola_vllm.core.state import StateLayout

TURNS = 5


def add_layer_options(
    parser: ArgumentParser, *, heads: int, kv_heads: int, state_heads: int, head_dim: int
) -> None:
    """Options that `make_layer` reads, with these defaults."""
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--heads", type=int, default=heads)
    parser.add_argument("--kv-heads", type=int, default=kv_heads)
    parser.add_argument("--state-heads", type=int, default=state_heads)
    parser.add_argument("--head-dim", type=int, default=head_dim)
    parser.add_argument("--feature-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")


def make_layer(
    args: Namespace, lam: int, interval: int, gen: torch.Generator
) -> tuple[StateLayout, LolaWeights]:
    """A layer's page layout, and random weights on `args.device`."""
    config = LolaConfig(
        window_size=args.window,
        sparse_cache_size=lam,
        update_interval=interval,
    )
    Hq, Hs, d = args.heads, args.state_heads, args.head_dim
    layout = StateLayout.from_config(
        config, args.kv_heads, Hs, d, args.feature_dim, getattr(torch, args.dtype)
    )
    maps = [torch.randn(h, d, args.feature_dim, generator=gen) * 0.3 for h in (Hq, Hs)]
    weights = LolaWeights.prepare(
        *(m.to(args.device) for m in maps),
        torch.full((Hq,), -2.2, device=args.device),
        "lola",
        args.kv_heads,
    )
    return layout, weights


def medians_s(
    runs: dict[str, Callable[[], object]], seconds: float, device: str
) -> dict[str, float]:
    """Median time of a call of each, over so many seconds of it, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            run()
            until = time.perf_counter() + seconds / TURNS
            while time.perf_counter() < until:
                begin = time.perf_counter()
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in times.items()}
