"""What benchmarks share: options, a process per engine, a server, and what is printed."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lola_vllm.evaluation import summary
from lola_vllm.evaluation.comparison import describe_machine
from lola_vllm.evaluation.results import fingerprint

ROOT = Path(__file__).parents[1]
MIB = 2**20
ENGINES = ("stock", "lola")
Results = dict[str, dict[str, float]]


def parser_of(doc: str | None, workers: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of a benchmark, which has `--out`.

    Args:
        doc: of the program; its first line is shown. workers: names for `run_worker`.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="a file for the summary")
    if workers:
        parser.add_argument("--worker", choices=workers, help=argparse.SUPPRESS)
    return parser


def run_worker(name: str) -> dict[str, float]:
    """Run this script again as `--worker NAME`; what it printed with `print_result`."""
    command = [sys.executable, *sys.argv, "--worker", name]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"the {name} engine failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
    found: dict[str, float] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def best_of(rounds: int, names: Sequence[str]) -> Results:
    """The best of some rounds, in which workers run one after the other.

    A shared machine only ever makes a run slower.
    """
    best: Results = {name: {} for name in names}
    for _ in range(rounds):
        for name in names:
            keep_best(best[name], run_worker(name))
    return best


def keep_best(best: dict[str, float], found: Mapping[str, float]) -> None:
    """Put what is better into `best`: more tokens and sequences, less time and memory."""
    for key, value in found.items():
        more = key.startswith(("decode_tokens", "prefill_tokens", "sequences"))
        best[key] = (max if more else min)(value, best.get(key, value))


def tokens(seed: int, count: int) -> list[int]:
    """Token ids that no other seed begins with."""
    return [(31 * seed + 7 * i) % 40000 + 100 for i in range(count)]


@contextmanager
def serving(
    command: list[str], env: dict[str, str]
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A running server: its address and its process.

    Args:
        command: without a port. env: the server's whole environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - closed below
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=log, stderr=log, start_new_session=True, env=env
    )
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    sys.exit(f"the server ended:\n{Path(log.name).read_text()[-3000:]}")
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(120)
        log.close()


def print_result(result: dict[str, float]) -> None:
    """For `run_worker`."""
    print("RESULT " + json.dumps(result))


def print_values(result: Mapping[str, float]) -> None:
    """A line for each value."""
    for name, value in result.items():
        print(f"{name:52} {value:12.2f}")


def print_table(results: Results) -> None:
    """The engines beside each other, and LoLA over each of the others."""
    others = [name for name in results if name != "lola"]
    print(f"{'':36}" + "".join(f"{name:>12}" for name in results), end="")
    print("".join(f"{f'LoLA/{name}':>16}" for name in others if "lola" in results))
    for key in dict.fromkeys(key for found in results.values() for key in found):
        values = (found.get(key, float("nan")) for found in results.values())
        print(f"{key:36}" + "".join(f"{value:12.1f}" for value in values), end="")
        lola = results.get("lola", {}).get(key)
        ratios = (lola / results[n][key] if lola and results[n].get(key) else None for n in others)
        print("".join(f"{ratio:16.2f}" if ratio else f"{'':16}" for ratio in ratios))


def write_report(args: argparse.Namespace, results: Any) -> None:
    """A summary of settings, models, machine and results, at `args.out` if that is given.

    Options that name a model directory are told by its fingerprint too, as `lola-vllm eval` does.
    """
    if not args.out:
        return
    settings = {
        k: v.name if isinstance(v, Path) else str(v)  # names, not where they lie here
        for k, v in vars(args).items()
        if k not in ("out", "worker")
    }
    models = {
        k: fingerprint(v)
        for k, v in vars(args).items()
        if isinstance(v, Path) and (v / "config.json").is_file()
    }
    report = {
        "settings": settings, "models": models, "machine": describe_machine(), "results": results,
    }  # fmt: skip
    summary.write(args.out, report, f"benchmarks/{Path(sys.argv[0]).name}")
