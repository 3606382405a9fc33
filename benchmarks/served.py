"""LoLA beside stock vLLM over HTTP, each started as its users start it.

    python benchmarks/served.py --out eval-results/served.json

Each server is a command line, run in an environment without variables of OpenMP and of vLLM's CPU
workers. vLLM's own client, `vllm bench serve`, asks each of them for every context and batch. The
order of servers is repeated `--rounds` times and the best round of a cell is kept, since a shared
machine only ever makes a server slower. Read the ratios.

With `--starts` each is started twice before, and timed to its first answer: with an empty cache of
compiled code, and with the one that the first start left.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from common import ROOT, Results, keep_best, parser_of, print_table, serving, write_report

from lola_vllm.core import cpu

BIN = Path(sys.executable).parent
# Variables that `make` and tests set, and that a user's shell has not.
NOT_A_USERS = ("OMP_", "GOMP_", "KMP_", "VLLM_CPU_", "VLLM_CACHE_ROOT")


def commands(args: argparse.Namespace) -> dict[str, str]:
    """The servers to ask: name -> variables, program and options, as in a shell."""
    dtype = cpu.preferred_dtype({}) or "auto"
    stock = f"vllm serve {args.stock}"
    found = {
        "stock": stock,
        "stock tuned": f"VLLM_CPU_OMP_THREADS_BIND=nobind {stock} --dtype {dtype}",
        "lola": f"lola-vllm serve {args.lola}",
    }
    for text in args.server:
        name, _, command = text.partition(": ")
        found[name] = command.format(stock=stock, lola=found["lola"])
    return {name: found[name] for name in args.only or found}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--lola", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--stock", type=Path, default=ROOT / "models/smollm2-base")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2000, 8000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", action="store_true", help="time the first and second start")
    parser.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="NAME: [VAR=VALUE ...] COMMAND",
        help="one more; {stock} and {lola} in it are the commands of these",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the servers, in this order")
    return parser.parse_args()


@contextmanager
def served(command: str, **variables: str) -> Iterator[tuple[str, str]]:
    """The server of a command line, which has answered once: its address and its model."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(NOT_A_USERS)} | variables
    words = shlex.split(command)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    with serving([str(BIN / words[0]), *words[1:]], env) as (url, _):
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        body = {"model": model, "prompt": "The capital", "max_tokens": 1}
        httpx.post(f"{url}/v1/completions", json=body, timeout=600).raise_for_status()
        yield url, model


def ask(
    url: str, model: str, args: argparse.Namespace, context: int, batch: int, seed: int
) -> dict[str, float]:
    """What vLLM's client measures of a batch of prompts: milliseconds and tokens per second."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *(str(BIN / "vllm"), "bench", "serve", "--backend", "openai"),
            *("--model", model, "--tokenizer", str(args.stock), "--base-url", url),
            *("--dataset-name", "random", "--random-input-len", str(context)),
            *("--random-output-len", str(args.tokens), "--ignore-eos", "--seed", str(seed)),
            *("--num-prompts", str(max(2, batch)), "--max-concurrency", str(batch)),
            *("--temperature", "0", "--disable-tqdm", "--save-result", "--result-dir", directory),
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(directory).iterdir())
        if not files:
            sys.exit(f"vllm bench serve failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
        found = json.loads(files[0].read_text())
    return {
        f"decode_tokens_per_s/{context}/{batch}": batch / found["median_itl_ms"] * 1e3,
        f"first_token_ms/{context}/{batch}": found["median_ttft_ms"],
    }


def main() -> None:
    """Ask all servers, print the table, write the JSON."""
    args = parse()
    servers = commands(args)
    best: Results = {name: {} for name in servers}
    with tempfile.TemporaryDirectory() as directory:
        for name, command in servers.items() if args.starts else ():
            for start in ("first", "second"):
                began = time.monotonic()
                with served(command, VLLM_CACHE_ROOT=f"{directory}/{name}"):
                    best[name][f"start_s/{start}"] = time.monotonic() - began
    for seed in range(args.rounds):
        for name, command in servers.items():
            with served(command) as (url, model):
                for context in args.contexts:
                    for batch in args.batches:
                        keep_best(best[name], ask(url, model, args, context, batch, seed))
            print_table(best)
    write_report(args, best)


if __name__ == "__main__":
    main()
