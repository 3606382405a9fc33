"""Thousands of stored conversations on one machine: turns of random ones, a kill, a full disk.

    python -m tools.texts --out models/texts
    python benchmarks/many_sessions.py --sessions 10000 --minutes 30 --out build/many_sessions.json

A server with a directory of states reads `--read` conversations of 500 to 8,000 tokens of real
text. Forks make `--sessions` of them: a fork is a session with a file of its own. Then:

    turns      random sessions go on with `--turn` new tokens, one after the other, for `--minutes`:
               tokens computed over new ones, time to the first token, memory of all processes
    restoring  every tenth turn has one new token, so its time is that of bringing the state back
    kill       `kill -9` in the middle of a turn; all sessions are asked for after the next start
    start      seconds until the server answers, with all files and with none
    budget     a start with half of the bytes: who leaves, and what is on the disk afterwards

`--scan` measures instead how long a store takes to open a directory of `--sessions` small files,
with a cold disk and a warm one:

    python benchmarks/many_sessions.py --scan --sessions 10000 --out build/scan.json

`--stock` and `--llama` take `--sample` of the same turns: stock vLLM with prefix caching, which has
the memory that the LoLA server has, and llama.cpp, which loads and saves a slot's file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
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

import numpy as np
import psutil
from common import MIB, ROOT, serving, write_report

from lola_vllm.command.client import ClientError
from lola_vllm.command.client.server import Server, path
from lola_vllm.memory.sessions.directory import StateDirectory, model_directory
from lola_vllm.memory.sessions.file import StateHeader, write_state
from lola_vllm.memory.sessions.fingerprint import Fingerprint
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes, namespace, token_array
from lola_vllm.memory.sessions.settings import StoreSettings
from lola_vllm.memory.sessions.store import SessionStore
from lola_vllm.training.texts import read_documents

SHORTEST, LONGEST = 500, 8000
ANSWER = 16  # tokens
QUIET = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # of a server beside its clients
RESTORE_EVERY = 10
SCAN_ROW, SCANS = 65_536, 3  # bytes of a state, and how often the directory is opened


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--stock", type=Path, help="the base model, for stock vLLM")
    parser.add_argument("--llama", choices=("BF16", "F16", "Q8_0", "Q4_1"), help="llama.cpp too")
    parser.add_argument("--data", type=Path, default=ROOT / "models/texts")
    parser.add_argument("--states", type=Path, help="default: a temporary directory")
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--read", type=int, default=200, help="of them that are really read")
    parser.add_argument("--turn", type=int, default=60, help="new tokens")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--sample", type=int, default=20)
    parser.add_argument("--scan", action="store_true", help="opening a directory, without a model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


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


def lola_command(args: argparse.Namespace, directory: Path, disk: int) -> list[str]:
    """`lola-vllm serve` with a directory of states."""
    return [
        str(Path(sys.executable).with_name("lola-vllm")), "serve", str(args.model),
        "--host", "127.0.0.1", "--enforce-eager", "--max-num-seqs", "4",
        "--lola-state-dir", str(directory), "--lola-state-disk", str(disk),
        "--lola-list-sessions",
    ]  # fmt: skip


def memory_of(process: subprocess.Popen[bytes]) -> int:
    """Bytes that a server's processes have for themselves, shared pages divided."""
    root = psutil.Process(process.pid)
    return sum(p.memory_full_info().pss for p in (root, *root.children(recursive=True)))


def turn(server: Server, name: str, new: list[int], answer: int) -> dict[str, Any]:
    """A turn of a session: seconds to its first token, tokens read and restored, its end."""
    body = {
        "prompt": new, "max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first = time.perf_counter(), 0.0
    usage: dict[str, Any] = {}
    told: dict[str, Any] = {}
    for event in server.events(path(name, "complete"), body):
        if event.get("choices") and not first:
            first = time.perf_counter() - began
        usage = event.get("usage") or usage
        told = (event.get("kv_transfer_params") or {}).get("lola") or told
    computed = usage["prompt_tokens"] - told["restored_tokens"]
    return {"first": first, "computed": computed, "new": len(new), **told}


def fill(server: Server, args: argparse.Namespace, texts: Texts) -> dict[str, int]:
    """Make the sessions: name -> tokens."""
    draw = random.Random(args.seed)
    said: dict[str, int] = {}
    for i in range(args.read):
        count = round(SHORTEST * (LONGEST / SHORTEST) ** draw.random())
        told = server.json("POST", path(f"chat-{i}", "append"), {"prompt": texts.take(count)})
        said[f"chat-{i}"] = told["tokens"]
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
        "memory at first, MiB": memory[0] / MIB,
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


def bytes_in(directory: Path) -> int:
    """Bytes of all files; a server may remove some meanwhile."""
    found = 0
    for file in _files(directory):
        with suppress(FileNotFoundError):
            found += file.stat().st_size
    return found


Results = dict[str, dict[str, float]]


def lola(args: argparse.Namespace, directory: Path, texts: Texts, results: Results) -> None:
    """All measurements of the LoLA server."""
    results["start"] = {}
    command = lola_command(args, directory, 2**50)
    with serving(command, QUIET) as (url, process, seconds):
        server = Server(url)
        results["start"]["with no file, s"] = seconds
        began = time.monotonic()
        said = fill(server, args, texts)
        results["fill"] = {"minutes": (time.monotonic() - began) / 60}
        results["turns"] = talk(server, process, args, texts, said)
        settle(directory)
        killed = random.Random(args.seed + 2).choice(list(said))
        body = {"prompt": texts.take(args.turn), "max_tokens": 200, "stream": True}
        for i, _ in enumerate(server.events(path(killed, "complete"), body)):
            if i == 5:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                break
    with serving(command, QUIET) as (url, _, seconds):
        server = Server(url)
        results["start"] |= {"with all files, s": seconds, "files": len(list(_files(directory)))}
        results["kill"] = after_kill(server, said, killed)
        results["turns"]["bytes on disk, GiB"] = bytes_in(directory) / 2**30
        found = turn(server, killed, texts.take(args.turn), ANSWER)
        results["kill"]["tokens the killed session computes"] = found["computed"]
    budget = bytes_in(directory) // 2
    with serving(lola_command(args, directory, budget), QUIET) as (url, _, _):
        server = Server(url)
        turn(server, server.sessions()[0]["session"], texts.take(args.turn), ANSWER)
        deadline = time.monotonic() + 300
        while bytes_in(directory) > 1.01 * budget and time.monotonic() < deadline:
            time.sleep(1)
        results["budget"] = {
            "budget, GiB": budget / 2**30,
            "bytes on disk, GiB": bytes_in(directory) / 2**30,
            "sessions left": len(server.sessions()),
        }


def _files(directory: Path) -> Iterator[Path]:
    return directory.rglob("*.safetensors")


def settle(directory: Path) -> None:
    """Wait until the files of the last turns are written."""
    before: set[str] = set()
    while before != (now := {file.name for file in _files(directory)}):
        before = now
        time.sleep(2)


def scan(args: argparse.Namespace, root: Path) -> dict[str, float]:
    """Seconds until a store knows all files of a directory; files of small states, as they need
    the same work as others before their pages are asked for."""
    fingerprint = Fingerprint(
        "c" * 32, "t" * 32, "float32", "", "l" * 32, "1x1", "a" * 16, "b" * 16
    )
    settings = StoreSettings(directory=root, disk=2**50)
    row = np.zeros(SCAN_ROW, np.uint8)
    directory = StateDirectory(model_directory(root, fingerprint), fingerprint)
    for i in range(args.sessions):
        tokens = token_array(range(i, i + SHORTEST))
        hashes = PrefixHashes(namespace(fingerprint.key), tokens)
        state = secrets.token_hex(16)
        header = StateHeader(
            state, f"chat-{i}", 1, "answer", len(tokens), hashes.prefix_hash(len(tokens)).hex(),
            hashes.block_hash(len(tokens)).hex(), fingerprint.to_dict(), created=time.time(),
        )  # fmt: skip
        write_state(directory.files(state)[0], header, tokens, row)
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(SCANS):
        forget_files(directory.path)
        for name in seconds:
            began = time.perf_counter()
            store = SessionStore(fingerprint, SCAN_ROW, settings)
            seconds[name].append(time.perf_counter() - began)
            assert len(store.states) == args.sessions
            store.close()
    return {f"{name}, s": statistics.median(taken) for name, taken in seconds.items()}


def forget_files(directory: Path) -> None:
    """Have the system drop what it has of a directory: all caches where that is allowed, else the
    content of its files."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in directory.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stock(args: argparse.Namespace, texts: Texts) -> dict[str, float]:
    """The same turns in stock vLLM, whose cache holds few of so many conversations."""
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(args.stock),
        "--host", "127.0.0.1", "--enforce-eager", "--max-num-seqs", "4",
        "--max-model-len", "8192", "--served-model-name", "stock",
    ]  # fmt: skip
    draw = random.Random(args.seed)
    firsts, computed = [], []
    with serving(command, {**QUIET, "VLLM_CPU_KVCACHE_SPACE": "1"}) as (url, _, _):
        server = Server(url)
        for _ in range(args.sample):
            count = round(SHORTEST * (LONGEST / SHORTEST) ** draw.random())
            body = {
                "model": "stock", "prompt": texts.take(count) + texts.take(args.turn),
                "max_tokens": 1, "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            began, first = time.perf_counter(), 0.0
            for event in server.events("/v1/completions", body):
                if event.get("choices") and not first:
                    first = time.perf_counter() - began
            firsts.append(1e3 * first)
            computed.append((count + args.turn) / args.turn)
    return {
        "tokens computed over new, mean": statistics.fmean(computed),
        "first token, p50 ms": statistics.median(firsts),
    }


def llama(args: argparse.Namespace, directory: Path, texts: Texts) -> dict[str, float]:
    """The same turns in llama.cpp: a slot's file is loaded, and saved after the turn."""
    import llamacpp

    engine = llamacpp.LlamaCpp(args.llama, LONGEST + args.turn + 8)
    draw = random.Random(args.seed)
    firsts, sizes = [], []
    for i in range(args.sample):
        count = round(SHORTEST * (LONGEST / SHORTEST) ** draw.random())
        ids, file = texts.take(count), directory / f"{i}.bin"
        engine.read(ids)
        engine.save(file, ids)
        sizes.append(file.stat().st_size / MIB)
        engine.read(texts.take(100))  # another conversation
        began = time.perf_counter()
        assert engine.load(file, count) == count
        engine.read(texts.take(args.turn), count)
        firsts.append(1e3 * (time.perf_counter() - began))
        file.unlink()
    return {
        "first token, p50 ms": statistics.median(firsts),
        "a file, mean MiB": statistics.fmean(sizes),
    }


def main() -> None:
    """Run everything, print it, write the JSON."""
    args = parse()
    directory = Path(tempfile.mkdtemp(dir=args.states))
    results: Results = {}
    try:
        if args.scan:
            results["scan"] = scan(args, directory)
        else:
            texts = Texts(args.data, args.model, args.seed)
            lola(args, directory, texts, results)
        if args.stock:
            results["stock vLLM"] = stock(args, texts)
        if args.llama:
            results["llama.cpp"] = llama(args, directory, texts)
    except ClientError as error:
        sys.exit(f"a request failed: {error}")
    finally:
        print(json.dumps(results), file=sys.stderr)
        shutil.rmtree(directory)
    for name, found in results.items():
        for what, value in found.items():
            print(f"{name:12} {what:52} {value:12.2f}")
    write_report(args, results)


if __name__ == "__main__":
    main()
