"""What stored states save and cost: a turn after a long text, and decoding with the store on.

    python benchmarks/sessions.py --out eval-results/sessions.json

A conversation has read `--before` tokens. Its next turn of `--turn` tokens is timed to the first
token, on engines that have the conversation in another way each:

    same process     the state is in the store's memory
    new process      the state is in a file, which another process wrote
    stock            the base model with a full KV cache and prefix caching
    llama.cpp        the base model in llama.cpp, whose cache has the conversation (with `--llama`)
    llama.cpp, new process    it loads the conversation from a file, as its server's slots do
    file, encrypted file      the state is in a file alone, as the store has no memory

Each is timed in turns with the turn's tokens alone on the same engine, which is the least that it
can take, and once with everything computed from nothing, which is what an engine without the state
does after a restart. Decoding is timed for `--batch` sequences, with the store on (each ends with
two states that are copied and written) and off, in turns.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llamacpp
from common import (
    ROOT,
    Results,
    parser_of,
    print_result,
    print_values,
    run_worker,
    tokens,
    write_report,
)

FILES = ("file", "encrypted file")
WORKERS = ("same process", "new process", "stock", *FILES)
LLAMA = ("llama.cpp", "llama.cpp, new process")
DECODING = ("store on", "store off")
STORED = ("same process", "new process", "store on", *FILES)  # those that have a store
NEW = 16  # tokens of an answer

# (prompts, new tokens, what kv_transfer_params say) -> seconds, the requests' outputs
Ask = Callable[..., tuple[float, Any]]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, WORKERS + LLAMA + DECODING)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--stock", type=Path, default=ROOT / "models/smollm2-base")
    parser.add_argument("--before", type=int, default=6000, help="tokens")
    parser.add_argument("--turn", type=int, default=300, help="tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=128, help="tokens to decode")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="of decoding with and without store")
    parser.add_argument(
        "--llama", action="store_true", help="llama.cpp too: pip install '.[bench]'"
    )
    return parser.parse_args()


def worker(args: argparse.Namespace) -> dict[str, float]:
    """Measure one engine, in this process if it reads no files while it serves."""
    # A server's engine sleeps while a state is read. In the caller's process it would not, and
    # would hold the lock that decryption needs.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if args.worker in FILES else "0"
    from vllm import LLM, SamplingParams, TokensPrompt

    has_store, states = args.worker in STORED, directory_of(args.worker)
    store = {"state_ram": 0 if args.worker in FILES else "1GiB", "state_dir": str(states)}
    if args.worker == "encrypted file":
        key = states.with_name("key")
        key.write_text(secrets.token_hex(32))
        key.chmod(0o600)
        store["state_key_file"] = str(key)
    llm = LLM(
        str(args.stock if args.worker == "stock" else args.model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=args.before + args.turn + args.new + 64,
        max_num_seqs=args.batch,
        kv_cache_memory_bytes=2**30,
        enable_prefix_caching=args.worker == "stock",
        additional_config={"lola": store} if has_store else {},
    )

    def ask(prompts: list[list[int]], new: int = 1, **lola: Any) -> tuple[float, Any]:
        extra = {"extra_args": {"kv_transfer_params": {"lola": lola}}} if has_store else {}
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, **extra)
        requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        begin = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        return time.perf_counter() - begin, outputs

    ask([tokens(1, 500)], save=False)  # first-use costs are not what is measured
    result = (decoding if args.worker in DECODING else turns)(args, ask)
    llm.llm_engine.engine_core.shutdown()
    return result


def directory_of(worker: str) -> Path:
    """Where an engine's states lie: those in files alone apart from the others."""
    return Path(os.environ["LOLA_BENCH_STATES"]) / (worker if worker in FILES else "states")


def turns(args: argparse.Namespace, ask: Ask) -> dict[str, float]:
    """A turn after a long text, its tokens alone, and everything from nothing, in milliseconds."""
    text = tokens(2, args.before)
    times: dict[str, list[float]] = {"turn": [], "alone": []}
    result: dict[str, float] = {}
    seconds, _ = ask([tokens(99, args.before + args.turn)], save=False)
    result["from nothing, ms"] = 1e3 * seconds
    if args.worker != "new process":
        ask([text], NEW, save="chat")
        ask([tokens(3, 40)])  # the step that copies the state
    if args.worker in FILES:
        while not list(directory_of(args.worker).rglob("*.safetensors")):
            time.sleep(0.1)
    for run in range(args.runs):
        turn = tokens(10 + run, args.turn)
        seconds, (output,) = ask([text + turn], save=False)
        if args.worker in STORED:
            assert output.num_cached_tokens == args.before, output.kv_transfer_params
        times["turn"].append(1e3 * seconds)
        seconds, _ = ask([turn[::-1]], save=False, **{"from": False})
        times["alone"].append(1e3 * seconds)
    return result | _summary(times["turn"], times["alone"])


def llama(args: argparse.Namespace) -> dict[str, float]:
    """As `turns`, in llama.cpp."""
    engine = llamacpp.LlamaCpp("BF16", args.before + args.turn + NEW)
    text, file = tokens(2, args.before), Path(os.environ["LOLA_BENCH_STATES"]) / "llama.bin"
    restarted = args.worker != LLAMA[0]

    def timed(ids: list[int], after: int = 0, load: bool = False) -> float:
        begin = time.perf_counter()
        if load:
            assert engine.load(file, args.before) == args.before
        engine.read(ids, after)
        return 1e3 * (time.perf_counter() - begin)

    result = {"from nothing, ms": timed(tokens(99, args.before + args.turn))}
    alone = [timed(tokens(10 + run, args.turn)) for run in range(args.runs)]
    if not restarted:
        engine.read(text)
        engine.save(file, text)
    # Each turn of a process that was started anew reads the file, as the first turn does there.
    turn = [timed(tokens(10 + r, args.turn), args.before, restarted) for r in range(args.runs)]
    return result | _summary(turn, alone)


def _summary(turn: list[float], alone: list[float]) -> dict[str, float]:
    """Milliseconds of turns and of their tokens alone, and ratios."""
    least = statistics.median(alone)
    return {
        "the first turn, ms": turn[0],  # a new process reads the file for it
        "a turn, ms": statistics.median(turn),
        "its tokens alone, ms": least,
        "a turn, of its tokens alone": statistics.median(turn) / least,
        "the first turn, of its tokens alone": turn[0] / least,
    }


def decoding(args: argparse.Namespace, ask: Ask) -> dict[str, float]:
    """Tokens per second of `--batch` sequences, the median of some runs."""
    rates = []
    for run in range(args.runs):
        prompts = [tokens(100 * run + i, 64) for i in range(args.batch)]
        seconds, _ = ask(prompts, args.new)
        rates.append(args.batch * args.new / seconds)
    return {"tokens per second": statistics.median(rates)}


def main() -> None:
    """Run the engines one after the other, print what they found, write the JSON."""
    args = parse()
    if args.worker:
        print_result(llama(args) if args.worker in LLAMA else worker(args))
        return
    with tempfile.TemporaryDirectory() as directory:
        os.environ["LOLA_BENCH_STATES"] = directory
        results: Results = {name: run_worker(name) for name in WORKERS}
        results |= {name: run_worker(name) for name in LLAMA if args.llama}
        rounds = [{name: run_worker(name) for name in DECODING} for _ in range(args.rounds)]
    rates = {n: [r[n]["tokens per second"] for r in rounds] for n in DECODING}
    results["decoding"] = {f"{n}, tokens per second": statistics.median(rates[n]) for n in DECODING}
    results["decoding"]["on over off"] = statistics.median(
        on / off for on, off in zip(*rates.values(), strict=True)
    )
    for name, found in results.items():
        print_values({f"{name}: {what}": value for what, value in found.items()})
    write_report(args, results)


if __name__ == "__main__":
    main()
