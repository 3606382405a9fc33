"""Thousands of stored conversations on one machine: turns of random ones, and a kill.

    python -m tools.texts --out models/texts
    python benchmarks/many_sessions.py --sessions 10000 --minutes 30 --out build/many_sessions.json

A server with a directory of states reads `--read` conversations of 500 to 8,000 tokens of real
text. Forks make `--sessions` of them: a fork is a session with a file of its own. Then:

    turns      random sessions go on with `--turn` new tokens, one after the other, for `--minutes`:
               tokens computed over new ones, time to the first token, memory of all processes
    restoring  every tenth turn has one new token, so its time is that of bringing the state back
    kill       `kill -9` in the middle of a turn; all sessions are asked for after the next start

`--stock` takes `--sample` of the same turns in stock vLLM with prefix caching, which has the memory
that the LoLA server has.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from common import MIB, ROOT, Results, parser_of, print_values, serving, write_report

from lola_vllm.command.client import ClientError
from lola_vllm.command.client.server import Server, path
from lola_vllm.training.texts import read_documents

SHORTEST, LONGEST = 500, 8000
ANSWER = 16  # tokens
QUIET = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # of a server beside its clients
RESTORE_EVERY = 10
BIN = Path(sys.executable).parent
SERVER = ["--host", "127.0.0.1", "--enforce-eager", "--max-num-seqs", "4"]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--stock", type=Path, help="the base model, for stock vLLM")
    parser.add_argument("--data", type=Path, default=ROOT / "models/texts")
    parser.add_argument("--states", type=Path, help="default: a temporary directory")
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--read", type=int, default=200, help="of them that are really read")
    parser.add_argument("--turn", type=int, default=60, help="new tokens")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--sample", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Texts:
    """Token ids of real text.

    Args:
        tokens: of all documents in a row.
    """

    def __init__(self, data: Path, model: Path, seed: int) -> None:
        from tokenizers import Tokenizer

        documents = [text for file in sorted(data.glob("*.txt")) for text in read_documents(file)]
        random.Random(seed).shuffle(documents)
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.tokens: list[int] = []
        for document in documents:
            self.tokens += tokenizer.encode(document).ids
            if len(self.tokens) > 3_000_000:
                break
        self._at = 0

    def take(self, count: int) -> list[int]:
        """The next tokens; after the last the first again."""
        if self._at + count > len(self.tokens):
            self._at = 0
        self._at += count
        return self.tokens[self._at - count : self._at]

    def conversation(self, chance: random.Random) -> list[int]:
        """The next tokens, short ones as often as long."""
        return self.take(round(SHORTEST * (LONGEST / SHORTEST) ** chance.random()))


def memory_of(process: subprocess.Popen[bytes]) -> int:
    """Bytes that a server's processes have for themselves, shared pages divided."""
    root = psutil.Process(process.pid)
    return sum(p.memory_full_info().pss for p in (root, *root.children(recursive=True)))


def asked(server: Server, url: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Seconds to the first token of a streamed answer, and what its last events say."""
    began, first = time.perf_counter(), 0.0
    said: dict[str, Any] = {}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    for event in server.events(url, body):
        if event.get("choices") and not first:
            first = time.perf_counter() - began
        said |= {key: value for key, value in event.items() if value}
    return first, said


def turn(server: Server, name: str, new: list[int], answer: int) -> dict[str, Any]:
    """A turn of a session: seconds to its first token, tokens read and restored, its end."""
    body = {"prompt": new, "max_tokens": answer, "temperature": 0, "ignore_eos": True}
    first, said = asked(server, path(name, "complete"), body)
    told = said["kv_transfer_params"]["lola"]
    computed = said["usage"]["prompt_tokens"] - told["restored_tokens"]
    return {"first": first, "computed": computed, "new": len(new), **told}


def fill(server: Server, args: argparse.Namespace, texts: Texts) -> dict[str, int]:
    """Make the sessions: name -> tokens."""
    draw = random.Random(args.seed)
    said: dict[str, int] = {}
    for i in range(args.read):
        body = {"prompt": texts.conversation(draw)}
        said[f"chat-{i}"] = server.json("POST", path(f"chat-{i}", "append"), body)["tokens"]
    for i in range(args.read, args.sessions):
        source = f"chat-{i % args.read}"
        server.json("POST", path(source, "fork"), {"to": f"chat-{i}"})
        said[f"chat-{i}"] = said[source]
    return said


def talk(
    server: Server, process: Any, args: argparse.Namespace, texts: Texts, said: dict[str, int]
) -> dict[str, float]:
    """Turns of random sessions until the time is over."""
    draw, names = random.Random(args.seed + 1), list(said)
    turns: list[dict[str, Any]] = []
    restores: list[float] = []
    memory = [memory_of(process)]
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        name = draw.choice(names)
        restore = len(turns) % RESTORE_EVERY == RESTORE_EVERY - 1
        new = texts.take(1 if restore else args.turn)
        found = turn(server, name, new, 1 if restore else ANSWER)
        said[name] = found["tokens"]
        if restore:
            restores.append(1e3 * found["first"])
        turns.append(found)
        if len(turns) % 50 == 0:
            memory.append(memory_of(process))
    # The last token of an answer is computed with the next turn.
    ratios = [found["computed"] / (found["new"] + 1) for found in turns]
    firsts = [1e3 * found["first"] for found in turns if found["new"] > 1]
    return {
        "turns": len(turns),
        "tokens computed over new, most": max(ratios),
        "first token, p50 ms": statistics.median(firsts),
        "first token, p99 ms": statistics.quantiles(firsts, n=100)[98],
        "restoring and one token, p50 ms": statistics.median(restores),
        "restoring and one token, p99 ms": statistics.quantiles(restores, n=100)[98],
        "memory after the first tenth, MiB": memory[max(1, len(memory) // 10)] / MIB,
        "memory at last, MiB": memory[-1] / MIB,
    }


def after_kill(server: Server, said: dict[str, int], killed: str) -> dict[str, float]:
    """What a start after a kill finds of all sessions."""
    there = {one["session"]: one for one in server.sessions()}
    behind = [n for n, tokens in said.items() if n in there and there[n]["tokens"] < tokens]
    return {
        "sessions before": len(said),
        "sessions lost": len(set(said) - set(there)),
        "sessions behind, but for the one that was killed": len(set(behind) - {killed}),
    }


def lola(args: argparse.Namespace, directory: Path, texts: Texts) -> Results:
    """All measurements of the LoLA server."""
    command = [
        str(BIN / "lola-vllm"), "serve", str(args.model), *SERVER, "--lola-list-sessions",
        "--lola-state-dir", str(directory), "--lola-state-disk", str(2**50),
    ]  # fmt: skip
    results: Results = {}
    with serving(command, QUIET) as (url, process):
        server = Server(url)
        said = fill(server, args, texts)
        results["turns"] = talk(server, process, args, texts, said)
        settle(directory)
        killed = random.Random(args.seed + 2).choice(list(said))
        body = {"prompt": texts.take(args.turn), "max_tokens": 200, "stream": True}
        for i, _ in enumerate(server.events(path(killed, "complete"), body)):
            if i == 5:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                break
    with serving(command, QUIET) as (url, _):
        server = Server(url)
        results["kill"] = after_kill(server, said, killed)
        results["turns"]["bytes on disk, GiB"] = bytes_in(directory) / 2**30
        turn(server, killed, texts.take(args.turn), ANSWER)  # it goes on
    return results


def _files(directory: Path) -> Iterator[Path]:
    return directory.rglob("*.safetensors")


def bytes_in(directory: Path) -> int:
    """Bytes of all files; a server may remove some meanwhile."""
    found = 0
    for file in _files(directory):
        with suppress(FileNotFoundError):
            found += file.stat().st_size
    return found


def settle(directory: Path) -> None:
    """Wait until the files of the last turns are written."""
    before: set[str] = set()
    while before != (now := {file.name for file in _files(directory)}):
        before = now
        time.sleep(2)


def stock(args: argparse.Namespace, texts: Texts) -> dict[str, float]:
    """The same turns in stock vLLM, whose cache holds few of so many conversations."""
    command = [
        str(BIN / "vllm"), "serve", str(args.stock), *SERVER,
        "--max-model-len", "8192", "--served-model-name", "stock",
    ]  # fmt: skip
    draw = random.Random(args.seed)
    firsts = []
    with serving(command, {**QUIET, "VLLM_CPU_KVCACHE_SPACE": "1"}) as (url, _):
        server = Server(url)
        for _ in range(args.sample):
            prompt = texts.conversation(draw) + texts.take(args.turn)
            body = {"model": "stock", "prompt": prompt, "max_tokens": 1}
            firsts.append(1e3 * asked(server, "/v1/completions", body)[0])
    return {"first token, p50 ms": statistics.median(firsts)}


def main() -> None:
    """Run everything, print it, write the JSON."""
    args = parse()
    texts = Texts(args.data, args.model, args.seed)
    with tempfile.TemporaryDirectory(dir=args.states) as directory:
        try:
            results = lola(args, Path(directory), texts)
            if args.stock:
                results["stock vLLM"] = stock(args, texts)
        except ClientError as error:
            sys.exit(f"a request failed: {error}")
    for name, found in results.items():
        print_values({f"{name}: {what}": value for what, value in found.items()})
    write_report(args, results)


if __name__ == "__main__":
    main()
