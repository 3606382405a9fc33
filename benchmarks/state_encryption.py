"""What encrypted files of stored states cost: a file written and read, and a turn that reads one.

    python benchmarks/state_encryption.py --out eval-results/state-encryption.json

The file is one of the model's states. A turn of `--turn` tokens goes on from a conversation of
`--before` tokens whose state is in a file alone: the store has no memory. Plain and encrypted files
are timed in turns, in `--rounds` pairs of processes.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, print_result, run_worker, tokens, write_report

from lola_vllm.memory.sessions.cipher import StateKey
from lola_vllm.memory.sessions.file import read_header, read_state, write_state

WORKERS = ("plain", "encrypted")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--before", type=int, default=6000, help="tokens")
    parser.add_argument("--turn", type=int, default=60, help="tokens")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def worker(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of turns in an engine whose states are in files.

    The engine has a process of its own, as a server's has: its loop sleeps while a state is read.
    In one process with the caller it does not, and holds the lock that decryption needs.
    """
    from vllm import LLM, SamplingParams, TokensPrompt

    with tempfile.TemporaryDirectory() as directory:
        store = {"state_ram": 0, "state_dir": f"{directory}/states"}
        if args.worker == "encrypted":
            key = Path(directory) / "key"
            key.write_text(secrets.token_hex(32))
            key.chmod(0o600)
            store["state_key_file"] = str(key)
        llm = LLM(
            str(args.model), enforce_eager=True, max_model_len=args.before + args.turn + 64,
            max_num_seqs=2, kv_cache_memory_bytes=2**29, enable_prefix_caching=False,
            additional_config={"lola": store},
        )  # fmt: skip

        def ask(prompt: list[int], **lola: object) -> tuple[float, int]:
            extra = {"kv_transfer_params": {"lola": lola}}
            params = SamplingParams(max_tokens=1, temperature=0.0, extra_args=extra)
            begin = time.perf_counter()
            (output,) = llm.generate(TokensPrompt(prompt_token_ids=prompt), params, use_tqdm=False)
            return 1e3 * (time.perf_counter() - begin), output.num_cached_tokens or 0

        text = tokens(2, args.before)
        ask(text, save="chat")
        ask(tokens(3, 40), save=False)
        while not list(Path(directory).rglob("*.safetensors")):
            time.sleep(0.1)
        (file,) = Path(directory).rglob("*.safetensors")
        times = []
        for run in range(args.runs + 2):
            took, cached = ask(text + tokens(10 + run, args.turn), save=False)
            assert cached == args.before
            times.append(took)
        result = {"a turn, ms": statistics.median(times[2:])}
        llm.llm_engine.engine_core.shutdown()
        return result | _file(file, args, store)


def _file(file: Path, args: argparse.Namespace, store: dict[str, object]) -> dict[str, float]:
    """Milliseconds of one file alone, without the engine; it lies in the page cache."""
    key = None
    if args.worker == "encrypted":
        key = StateKey(Path(str(store["state_key_file"])).read_bytes().strip())
    state = read_state(file, None, key)
    taken: dict[str, list[float]] = {"write": [], "read": [], "header": []}
    for _ in range(args.runs):
        begin = time.perf_counter()
        write_state(file, state.header, state.tokens, state.data, key)
        taken["write"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        found = read_state(file, None, key)
        taken["read"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        read_header(file, key)
        taken["header"].append(time.perf_counter() - begin)
    assert np.array_equal(found.data, state.data)
    return {f"{name} a file, ms": 1e3 * statistics.median(s) for name, s in taken.items()} | {
        "a file, MiB": file.stat().st_size / 2**20
    }


def main() -> None:
    """Run the pairs, print the medians and the ratio, write the JSON."""
    args = parse()
    if args.worker:
        print_result(worker(args))
        return
    rounds = [{name: run_worker(name) for name in WORKERS} for _ in range(args.rounds)]
    results = {
        name: {what: statistics.median(r[name][what] for r in rounds) for what in rounds[0][name]}
        for name in WORKERS
    }
    for what in results["plain"]:
        plain, encrypted = results["plain"][what], results["encrypted"][what]
        print(f"{what:24}{plain:10.2f}{encrypted:10.2f}{encrypted / plain:8.2f}")
    write_report(args, results)


if __name__ == "__main__":
    main()
