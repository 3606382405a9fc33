"""What becomes of the sums H and s of one head in a hundred million tokens, shifted or not.

    python benchmarks/endless_sums.py --out eval-results/endless-sums.json

Records features and values of a model on real text, at the RoPE positions that tokens have after a
context shift, and folds them again and again, as kernels do: float32 sums, rounded to nearest or
with a dither, multiplied by 1 - D / P at each context shift, or never. float64 sums of the same
stand beside them. Every pair is folded; a window and a sparse cache would keep some, which changes
no sum by more than their size. Some columns of H stand for all, as each is a sum of its own.

Then another text follows, and the question is how soon predictions are of that one.

numba, which vLLM brings, compiles the loop over updates.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from lola_vllm.core.config import default_context_shift
from lola_vllm.core.ops.constants import EXPONENT_BITS
from lola_vllm.core.ops.dither import dither
from lola_vllm.evaluation import summary

sys.path.insert(0, str(Path(__file__).parent))
from common import cpu_name

Array = NDArray[Any]


@dataclass(frozen=True)
class Block:
    """Tokens of a text; a whole number of blocks is folded between two context shifts.

    Attributes:
        phi: `[n, 2F]`, float32, features of keys. v: `[n, c]`, float32, columns of values.
    """

    phi: Array
    v: Array

    def folds(self, interval: int) -> Array:
        """`[n / C, 2F, c + 1]`, float32: what each update adds to H and, last column, to s."""
        one = np.ones((len(self.v), 1), np.float32)
        v = np.concatenate([self.v, one], axis=1).reshape(-1, interval, self.v.shape[1] + 1)
        phi = self.phi.reshape(-1, interval, self.phi.shape[1])
        return np.ascontiguousarray(np.einsum("uif,uic->ufc", phi, v), np.float32)

    def predictions(self, sums: Array) -> Array:
        """`[n, c]`, what sums `[2F, c + 1]` recall for the block's keys, in float64."""
        found = self.phi.astype(np.float64) @ sums.astype(np.float64)
        return found[:, :-1] / found[:, -1:]


@dataclass(frozen=True)
class Sample:
    """The sums after so many tokens.

    Attributes:
        tokens: folded. mass: sum of s over 2, pairs that the state holds.
        largest: entry of the sums. error: of float32's predictions against float64's, relative.
        mass_error: of float32's mass against float64's, relative.
        newest: share of the mass that is of the newest P tokens.
    """

    tokens: int
    mass: float
    largest: float
    error: float
    mass_error: float
    newest: float


@numba.njit(cache=False)
def fold_block(
    sums: Array, power: Array, bits: Array, folds: Array, turns: Array
) -> None:  # pragma: no cover (compiled)
    """Folds `[U, n]` into float32 sums `[n]`, as `core/ops/dither.py` rounds.

    Args:
        power, bits: one array of `[n]` as float32 and as int32, for the last places of sums.
        turns: `[U, n]`, dithers of each update; `[U, 0]` rounds to nearest.
    """
    bits_of_sums = sums.view(np.int32)
    for u in range(len(folds)):
        if turns.shape[1]:
            for i in range(len(sums)):
                bits[i] = bits_of_sums[i] & EXPONENT_BITS
            for i in range(len(sums)):
                sums[i] = sums[i] + (folds[u, i] + power[i] * turns[u, i])
        else:
            for i in range(len(sums)):
                sums[i] = sums[i] + folds[u, i]


class Run:
    """Sums of one way to fold.

    Args:
        block: that is folded first. length: P. every: D, tokens between two context shifts.
            interval: C.
        shifted: or not, at any length. dithered: or rounded to nearest.
    """

    def __init__(
        self, block: Block, length: int, every: int, interval: int, shifted: bool, dithered: bool
    ) -> None:
        self.length, self.every, self.interval = length, every, interval
        self.decay = 1 - every / length if shifted else 1.0
        self.dithered, self.tokens = dithered, 0
        self.shape = block.phi.shape[1], block.v.shape[1] + 1
        self.sums = np.zeros(self.shape, np.float32)
        self.exact = np.zeros(self.shape)
        self._power = np.zeros(self.sums.size, np.float32)

    def feed(self, block: Block, times: int) -> None:
        """Fold a block so many times, after a context shift where one is due."""
        folds = block.folds(self.interval)
        total = folds.sum(axis=0, dtype=np.float64)
        flat = folds.reshape(len(folds), -1)
        for _ in range(times):
            if self.tokens >= self.length and (self.tokens - self.length) % self.every == 0:
                self.sums *= np.float32(self.decay)
                self.exact *= self.decay
            bits = self._power.view(np.int32)
            fold_block(self.sums.reshape(-1), self._power, bits, flat, self._turns(len(folds)))
            self.exact += total
            self.tokens += len(block.v)

    def _turns(self, updates: int) -> Array:
        if not self.dithered or not self.tokens:  # the first fold, into an empty state, has none
            return np.zeros((updates, 0), np.float32)
        numbers = torch.arange(updates) + self.tokens // self.interval + 1
        rows = dither(numbers, self.shape[0]).numpy()
        return np.repeat(rows, self.shape[1], axis=1)

    def sample(self, block: Block) -> Sample:
        """See `Sample`; of the block that is folded."""
        mass, exact = self.sums[:, -1].sum(dtype=np.float64) / 2, self.exact[:, -1].sum() / 2
        p, q = block.predictions(self.sums), block.predictions(self.exact)
        size = len(block.v)
        starts = range(max(0, self.tokens - self.length), self.tokens, size)
        shifts = [max(0, (start - self.length) // self.every + 1) for start in starts]
        newest = sum(self.decay ** (shifts[-1] - n) for n in shifts) * size
        return Sample(
            self.tokens,
            float(mass),
            float(np.abs(self.sums).max()),
            float(np.mean(np.linalg.norm(p - q, axis=1) / np.linalg.norm(q, axis=1))),
            float(mass / exact - 1),
            float(newest / exact),
        )


def simulate(
    old: Block,
    new: Block,
    length: int,
    every: int,
    tokens: int,
    interval: int,
    shifted: bool,
    dithered: bool,
) -> dict[str, Any]:
    """Samples at P and at ten times as many tokens each, and how the text after is followed.

    Args:
        old, new: blocks of two texts. length: P. every: D. tokens: of the old text.
    """
    run = Run(old, length, every, interval, shifted, dithered)
    samples, size = [], len(old.v)
    stops = [length, *(10**e for e in range(4, 20) if length < 10**e < tokens), tokens]
    for stop in stops:
        run.feed(old, max(1, round((stop - run.tokens) / size)))
        samples.append(run.sample(old))
    fresh = Run(new, length, every, interval, False, dithered)
    fresh.feed(new, length // size)
    goal = new.predictions(fresh.exact)
    away = {0: _distance(new.predictions(run.sums), goal)}
    for times in (1, 2, 4):
        run.feed(new, (times * length - (max(away))) // size)
        away[times * length] = _distance(new.predictions(run.sums), goal)
    return {
        "length": length,
        "interval": interval,
        "decay": run.decay,
        "dithered": dithered,
        "samples": [asdict(sample) for sample in samples],
        "away_from_the_new_text": [
            {"tokens": tokens, "relative": distance} for tokens, distance in away.items()
        ],
    }


def _distance(p: Array, goal: Array) -> float:
    return float(np.linalg.norm(p - goal) / np.linalg.norm(goal))


def record(
    model: Path, text: Path, length: int, size: int, layer: int, head: int, columns: int
) -> Block:
    """Features and values of a text's tokens from P - D to P, of one KV head of one layer.

    Raises:
        SystemExit: the text is shorter than P.
    """
    from lola_vllm.core.ops.reference import feature_map
    from lola_vllm.evaluation.models import LocalTokenizer
    from lola_vllm.evaluation.reader import Run as Sequence
    from lola_vllm.evaluation.reader import load
    from lola_vllm.evaluation.settings import Setting
    from lola_vllm.evaluation.stream import StreamPlan

    streams = list(StreamPlan(str(text), length, length // 2).streams(LocalTokenizer(model)))
    if not streams or len(streams[0].ids) < length:
        sys.exit(f"--texts {text}: fewer held-out tokens than the model's {length}; give more text")
    loaded = load(Setting("recorded", model), "float32")
    attention = loaded.model.layers[layer].self_attn
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    project = attention.qkv

    def qkv(*args: Any) -> Any:
        q, k, v = project(*args)
        seen.append((k[0, :, head].detach(), v[0, :, head].detach()))
        return q, k, v

    attention.qkv = qkv
    Sequence(loaded).read(streams[0].ids)
    k, v = (torch.cat(parts)[-size:] for parts in zip(*seen, strict=True))
    group = attention.feature_map_k.shape[0] // loaded.config.num_key_value_heads
    phi = feature_map(k, attention.feature_map_k[head * group].detach())
    return Block(phi.numpy(), v[:, :columns].contiguous().numpy())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-lola"))
    parser.add_argument(
        "--texts", type=Path, nargs=2, metavar=("OLD", "NEW"),
        default=[Path("models/texts/python_docs.txt"), Path("models/texts/shakespeare_milton.txt")],
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=10**8)
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[8192],
        metavar="P",
        help="trained lengths; D is a quarter, into which the recorded tokens are repeated",
    )
    parser.add_argument("--intervals", type=int, nargs="+", default=[64, 1], metavar="C")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--head", type=int, default=0, help="a KV head")
    parser.add_argument("--columns", type=int, default=7, help="of H that are computed")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    """Record, simulate, print, write the JSON."""
    args = parse()
    own = int(json.loads((args.model / "config.json").read_text())["max_position_embeddings"])
    size = default_context_shift(own)
    for length in args.lengths:
        if length % (4 * size):
            sys.exit(f"--lengths {length}: must be a multiple of the model's {4 * size}")
    shape = (own, size, args.layer, args.head, args.columns)
    old, new = (record(args.model, text, *shape) for text in args.texts)
    results = []
    ways = product(args.lengths, args.intervals, (True, False), (True, False))
    for length, interval, shifted, dithered in ways:
        every = default_context_shift(length)
        found = simulate(old, new, length, every, args.tokens, interval, shifted, dithered)
        results.append(found)
        last = found["samples"][-1]
        away = [round(row["relative"], 3) for row in found["away_from_the_new_text"]]
        print(
            f"P {length:6}, C {interval:3}, decay {found['decay']:4}, dither {dithered!s:5}: "
            f"{last}, {away}",
            flush=True,
        )
    if args.out:
        settings = {
            "model": args.model.name,
            "texts": [text.stem for text in args.texts],
            **{k: v for k, v in vars(args).items() if k not in ("model", "texts", "out")},
        }
        machine = {"cpu": cpu_name(), "python": platform.python_version()}
        report = {"settings": settings, "length": own, "machine": machine, "results": results}
        summary.write(args.out, report, "benchmarks/endless_sums.py")


if __name__ == "__main__":
    main()
