"""What stored states save and cost: a turn after a long text, and decoding with the store on.

    python benchmarks/sessions.py --out benchmarks/results/sessions.json

A conversation has read `--before` tokens. Its next turn of `--turn` tokens is timed to the first
token, on engines that have the conversation in another way each:

    same process     the state is in the store's memory
    new process      the state is in a file, which another process wrote
    prefix caching   no store; vLLM keeps a state every 1,024 tokens or so
    stock            the base model with a full KV cache and prefix caching

Each is timed in turns with the turn's tokens alone on the same engine, which is the least that it
can take, and once with everything computed from nothing, which is what an engine without the state
does after a restart. `chat` counts the tokens that `--turns` turns of `--turn` tokens compute.
Decoding is timed for `--batch` sequences, with the store on (each ends with two states that are
copied and written) and off, in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, print_result, run_worker, write_report

WORKERS = ("same process", "new process", "prefix caching", "stock", "chat")
DECODING = ("store on", "store off")
STORED = ("same process", "new process", "chat", "store on")  # those that have a store
NEW = 16  # tokens of an answer

# (prompts, new tokens, what kv_transfer_params say) -> seconds, the requests' outputs
Ask = Callable[..., tuple[float, Any]]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--stock", type=Path, default=ROOT / "models/smollm2-base")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--before", type=int, default=6000, help="tokens")
    parser.add_argument("--turn", type=int, default=300, help="tokens")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=128, help="tokens to decode")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="of decoding with and without store")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=WORKERS + DECODING, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def tokens(seed: int, count: int) -> list[int]:
    """Token ids that no other seed begins with."""
    return [(31 * seed + 7 * i) % 40000 + 100 for i in range(count)]


def worker(args: argparse.Namespace) -> dict[str, float]:
    """Measure one engine in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams, TokensPrompt

    has_store = args.worker in STORED
    stored = {"lola": {"state_ram": "1GiB", "state_dir": os.environ["LOLA_BENCH_STATES"]}}
    llm = LLM(
        str(args.stock if args.worker == "stock" else args.model),
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=max(args.before + args.turn, args.turns * (args.turn + NEW)) + args.new + 64,
        max_num_seqs=args.batch,
        kv_cache_memory_bytes=2**30,
        enable_prefix_caching=args.worker in ("prefix caching", "stock"),
        additional_config=stored if has_store else {},
    )

    def ask(prompts: list[list[int]], new: int = 1, **lola: Any) -> tuple[float, Any]:
        extra = {"extra_args": {"kv_transfer_params": {"lola": lola}}} if has_store else {}
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, **extra)
        requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        begin = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        return time.perf_counter() - begin, outputs

    ask([tokens(1, 500)], save=False)  # first-use costs are not what is measured
    measure = decoding if args.worker in DECODING else chat if args.worker == "chat" else turns
    result = measure(args, ask)
    llm.llm_engine.engine_core.shutdown()
    return result


def turns(args: argparse.Namespace, ask: Ask) -> dict[str, float]:
    """A turn after a long text, its tokens alone, and everything from nothing, in milliseconds."""
    text, times = tokens(2, args.before), {"a turn, ms": [], "its tokens alone, ms": []}
    result: dict[str, float] = {}
    seconds, _ = ask([tokens(99, args.before + args.turn)], save=False)
    result["from nothing, ms"] = 1e3 * seconds
    if args.worker != "new process":
        ask([text], NEW, save="chat")
        ask([tokens(3, 40)])  # the step that copies the state
    for run in range(args.runs):
        turn = tokens(10 + run, args.turn)
        seconds, (output,) = ask([text + turn], save=False)
        result["tokens not computed"] = output.num_cached_tokens
        if args.worker in STORED:
            assert output.num_cached_tokens == args.before, output.kv_transfer_params
        times["a turn, ms"].append(1e3 * seconds)
        seconds, _ = ask([turn[::-1]], save=False, **{"from": False})
        times["its tokens alone, ms"].append(1e3 * seconds)
    result["the first turn, ms"] = times["a turn, ms"][0]  # a new process reads the file for it
    result |= {name: statistics.median(values) for name, values in times.items()}
    alone = result["its tokens alone, ms"]
    result["a turn, of its tokens alone"] = result["a turn, ms"] / alone
    result["the first turn, of its tokens alone"] = result["the first turn, ms"] / alone
    return result


def chat(args: argparse.Namespace, ask: Ask) -> dict[str, float]:
    """Tokens that each turn of a growing conversation computes, over those that are new in it."""
    said: list[int] = []
    shares = []
    for turn in range(args.turns):
        known = len(said)
        said = said + tokens(50 + turn, args.turn)
        _, (output,) = ask([said], NEW, save="grows")
        shares.append((len(said) - output.num_cached_tokens) / (len(said) - known))
        said += output.outputs[0].token_ids
    return {"computed over new, last turn": shares[-1], "computed over new, most": max(shares)}


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
        print_result(worker(args))
        return
    with tempfile.TemporaryDirectory() as directory:
        os.environ["LOLA_BENCH_STATES"] = directory
        results: dict[str, dict[str, float]] = {name: run_worker(name) for name in WORKERS}
        rounds = [{name: run_worker(name) for name in DECODING} for _ in range(args.rounds)]
    rates = {n: [r[n]["tokens per second"] for r in rounds] for n in DECODING}
    results["decoding"] = {f"{n}, tokens per second": statistics.median(rates[n]) for n in DECODING}
    results["decoding"]["on over off"] = statistics.median(
        on / off for on, off in zip(*rates.values(), strict=True)
    )
    for name, found in results.items():
        for what, value in found.items():
            print(f"{name:16} {what:36} {value:10.2f}")
    write_report(args, results)


if __name__ == "__main__":
    main()
