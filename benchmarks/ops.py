"""The ops against the memory bus: bytes moved, bandwidth reached, ratio to a plain read.

    python benchmarks/ops.py --out eval-results/ops.json
    python benchmarks/ops.py --prefill cpp torch --batches 1 8 --lams 512 --intervals 64

Each case cycles through more pages than the caches hold, as a model's layers do. The ceiling is a
multi-threaded read of a large buffer. All that a row compares is measured in short turns, as other
work on the machine moves it. Shapes default to SmolLM2-135M's (Hq 9, Hkv 3, d 64), pages in
bfloat16.

A step must read the live window, sinks and sparse pairs, H and s: `mib_read`. `frozen` is the same
step on pages that never reach an update point; the ratio to it is what rescoring costs. Pages are
those of a sequence of random keys and values. Intervals are of 2 tokens or more: with an update at
every token there is no step without one. On a GPU steps are replayed from CUDA graphs, as a served
model's are.

With `--prefill` the prefill ops of several back ends are timed in turns instead: batches of prompts
of `--prompts` tokens that start from empty pages, or continue sequences of `--after` tokens.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from common import parser_of, write_report

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import (
    Backend,
    DecodeBatch,
    LayerState,
    LolaWeights,
    PrefillBatch,
    choose_backend,
)
from lola_vllm.core.ops.select import ENV
from lola_vllm.core.state import LayerLayout, StateLayout

TURNS = 5  # of all that a row compares
POOL_BYTES = 192 * 2**20  # beyond the last-level cache of anything this is likely to run on
GRAPH_TURNS = 16  # tokens per sequence of one CUDA graph
WINDOW, FEATURES, DTYPE = 64, 64, torch.bfloat16


def make_layer(
    args: argparse.Namespace, lam: int, interval: int, gen: torch.Generator
) -> tuple[StateLayout, LolaWeights]:
    """A layer's page layout, and random weights on `args.device`."""
    config = LolaConfig(window_size=WINDOW, sparse_cache_size=lam, update_interval=interval)
    Hq, Hs, d = args.heads, args.state_heads, args.head_dim
    layout = StateLayout.from_config(config, args.kv_heads, Hs, d, FEATURES, DTYPE)
    maps = [torch.randn(h, d, FEATURES, generator=gen) * 0.3 for h in (Hq, Hs)]
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


class Case:
    """A pool of pages that have seen the same tokens, and inputs for a step."""

    def __init__(self, args: argparse.Namespace, batch: int, lam: int, interval: int) -> None:
        gen = torch.Generator().manual_seed(0)
        self.layout, weights = make_layer(args, lam, interval, gen)
        Hq, Hkv, d = args.heads, args.kv_heads, args.head_dim
        dtype = self.layout.kv_dtype
        self.batch = batch
        pages = max(batch, POOL_BYTES // self.layout.page_bytes // batch * batch) + 1
        device = torch.device(args.device)
        pool = torch.empty(pages, self.layout.page_bytes, dtype=torch.uint8, device=device)
        self.state = LayerState.bind(weights, LayerLayout((self.layout,)), pool)
        self.ops = choose_backend(device.type, dtype)

        # A full cache and a hidden state in use, at the start of an interval.
        least = 4 * (self.layout.window_size + lam + interval)
        self.start = -(-max(least, args.context) // interval) * interval
        tokens = max(self.start, batch)
        self.q, self.k, self.v = (
            torch.randn(tokens, h, d, generator=gen).to(device, dtype) for h in (Hq, Hkv, Hkv)
        )
        self.out = torch.empty_like(self.q)
        seen = [x[: self.start] for x in (self.q, self.k, self.v)]
        prompt = PrefillBatch(
            torch.tensor([1], dtype=torch.int32, device=device),
            torch.tensor([0, self.start], dtype=torch.int32),
            torch.tensor([0], dtype=torch.int32),
        )
        self.ops.prefill(self.state, *seen, prompt, self.out[: self.start])
        self.pool, self.fresh_page = pool, pool[1].clone()
        self.reset()

        groups = torch.arange(1, pages, dtype=torch.int32, device=device).split(batch)
        self.groups = [g for g in groups if len(g) == batch]
        self.inputs = [x[:batch] for x in (self.q, self.k, self.v, self.out)]
        self.lengths: dict[int, torch.Tensor] = {}

    def reset(self) -> None:
        """Back to pages that have seen the first tokens only."""
        self.pool[1:] = self.fresh_page
        self.calls = 0

    def step(self, n: int) -> None:
        """One decode step of the next batch of pages, in which each reaches n tokens."""
        q, k, v, out = self.inputs
        lengths = self.lengths.get(n)
        if lengths is None:
            lengths = torch.full((self.batch,), n, dtype=torch.int32, device=q.device)
            self.lengths[n] = lengths
        state_indices = self.groups[self.calls % len(self.groups)]
        self.ops.decode(self.state, q, k, v, DecodeBatch(state_indices, lengths), out)
        self.calls += 1

    def bytes_read(self, n: int) -> int:
        """Bytes that a step at n tokens must read from the pages of the batch."""
        layout, at = self.layout, torch.tensor(n - 1)
        pair = 2 * layout.head_dim * layout.kv_dtype.itemsize
        window = n - 1 - int(layout.window_start(at)) + layout.sink_size
        exact = layout.num_kv_heads * window * pair
        sparse = layout.num_sparse_heads * int(layout.num_sparse(at)) * pair
        state = layout.part_bytes["H"] + layout.part_bytes["s"]
        return self.batch * (exact + sparse + state)


def graphed(case: Case, step: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """One CUDA graph of many steps, and how many: launched one by one they would wait for the host.

    The graph resets the pages first, which takes as long as one or two of its steps.
    """
    steps = GRAPH_TURNS * len(case.groups)

    def cycle() -> None:
        case.reset()
        for _ in range(steps):
            step()

    cycle()  # compiles, and makes what is made once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cycle()
    return graph.replay, steps


def measure(args: argparse.Namespace, batch: int, lam: int, interval: int) -> dict[str, float]:
    """One row of the table."""
    case = Case(args, batch, lam, interval)
    # Half-way through an interval: the average window, and no update.
    quiet = case.start + interval // 2
    bytes_read = case.bytes_read(quiet)
    large = torch.ones(64 * 2**20, device=args.device)
    runs: dict[str, Callable[[], object]] = {
        "frozen": lambda: case.step(quiet),
        "update": lambda: case.step(case.start + interval),
        "read": large.sum,
    }
    steps = dict.fromkeys(runs, 1)
    if args.device == "cuda":
        for name in ("frozen", "update"):
            runs[name], steps[name] = graphed(case, runs[name])
    found = medians_s(runs, args.seconds, args.device)
    found = {name: took / steps[name] for name, took in found.items()}
    frozen_s, update_s = found["frozen"], found["update"]
    step_s = frozen_s + (update_s - frozen_s) / interval
    speed = bytes_read / frozen_s
    read = large.nbytes / found["read"]
    return {
        "batch": batch,
        "lam": lam,
        "interval": interval,
        "mib_read": bytes_read / 2**20,
        "frozen_us": frozen_s * 1e6,
        "update_us": update_s * 1e6,
        "step_us": step_s * 1e6,
        "step_over_frozen": step_s / frozen_s,
        "gb_per_s": speed / 1e9,
        "of_read": speed / read,
    }


def forced(name: str, device: str, dtype: torch.dtype) -> Backend:
    """The back end of a name, which `LOLA_VLLM_OPS` would choose."""
    os.environ[ENV] = name
    choose_backend.cache_clear()
    return choose_backend(device, dtype)


def prompts(
    args: argparse.Namespace, rows: int, lam: int, interval: int, tokens: int, context: int
) -> Callable[[Backend], None]:
    """A call of prefill on `rows` prompts of `tokens` tokens after `context` others, the same at
    every call: pages are as they were then, which takes a copy of them."""
    gen = torch.Generator().manual_seed(0)
    layout, weights = make_layer(args, lam, interval, gen)
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


def measure_prefill(
    args: argparse.Namespace, rows: int, lam: int, interval: int, tokens: int, context: int
) -> dict[str, float]:
    """Tokens per second of each back end, the median of its turns, and its part of the first's."""
    call = prompts(args, rows, lam, interval, tokens, context)
    backends = {name: forced(name, args.device, DTYPE) for name in args.prefill}
    runs = {name: functools.partial(call, backend) for name, backend in backends.items()}
    found = medians_s(runs, args.seconds, args.device)
    speed = {name: rows * tokens / took for name, took in found.items()}
    first, *others = speed
    return {
        "batch": rows,
        "lam": lam,
        "interval": interval,
        "tokens": tokens,
        "context": context,
        **{f"{name}_tokens_per_s": value for name, value in speed.items()},
        **{f"{name}_of_{first}": speed[name] / speed[first] for name in others},
    }


def main() -> None:
    """Print the table, write the JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--lams", type=int, nargs="+", default=[0, 128, 512, 768])
    parser.add_argument("--intervals", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--context", type=int, default=4096, help="tokens that pages have seen")
    parser.add_argument("--prefill", nargs="+", metavar="BACKEND", help="prefill, of these")
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048, 8192], metavar="TOKENS")
    parser.add_argument("--after", type=int, nargs="+", default=[0, 4096], metavar="TOKENS")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--state-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement")
    args = parser.parse_args()
    sizes: list[Iterable[int]] = [args.batches, args.lams, args.intervals]
    row_of: Callable[..., dict[str, float]] = measure
    if args.prefill:
        sizes += [args.prompts, args.after]
        row_of = measure_prefill
    rows = []
    for each in itertools.product(*sizes):
        rows.append(row_of(args, *each))
        if len(rows) == 1:
            print("".join(f"{key:>24}" for key in rows[0]))
        print("".join(f"{value:24.2f}" for value in rows[-1].values()), flush=True)
    args.threads = torch.get_num_threads()
    write_report(args, rows)


if __name__ == "__main__":
    main()
