"""What stored states save and cost: a turn after a long text, and decoding with the store on.

    python benchmarks/sessions.py --out benchmarks/results/sessions.json

A session reads `--before` tokens. Its next turn of `--turn` tokens is timed to the first token: in
the same process, in a new process that finds the state in a file, computed from nothing, and the
turn's tokens alone, which is the least that a turn can take. Decoding is timed for `--batch`
sequences, with the store on (each ends with two states that are copied and written) and off.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, print_result, run_worker, write_report

WORKERS = ("same process", "new process", "store on", "store off")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--before", type=int, default=6000, help="tokens")
    parser.add_argument("--turn", type=int, default=300, help="tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=128, help="tokens to decode")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def worker(args: argparse.Namespace) -> dict[str, float]:
    """Measure one engine in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams, TokensPrompt

    directory = os.environ["LOLA_BENCH_STATES"]
    stored = {"lola": {"state_ram": "1GiB", "state_dir": directory}}
    llm = LLM(
        str(args.model),
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=args.before + args.turn + args.new + 64,
        max_num_seqs=args.batch,
        enable_prefix_caching=False,
        additional_config={} if args.worker == "store off" else stored,
    )

    def tokens(seed: int, count: int) -> list[int]:
        return [(31 * seed + 7 * i) % 40000 + 100 for i in range(count)]

    def ask(prompts: list[list[int]], new: int, **lola: Any) -> tuple[float, Any]:
        params = SamplingParams(
            max_tokens=new,
            temperature=0.0,
            ignore_eos=True,
            extra_args={"kv_transfer_params": {"lola": lola}},
        )
        requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        begin = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        return time.perf_counter() - begin, outputs

    ask([tokens(1, 500)], 1, save=False)  # first-use costs are not what is measured
    result: dict[str, float] = {}
    if args.worker in ("store on", "store off"):
        rates = []
        for run in range(args.runs):
            prompts = [tokens(100 * run + i, 64) for i in range(args.batch)]
            seconds, _ = ask(prompts, args.new)
            rates.append(args.batch * args.new / seconds)
        result["tokens per second"] = statistics.median(rates)
    else:
        text = tokens(2, args.before)
        if args.worker == "same process":
            ask([text], 16, save="chat")
            ask([tokens(3, 40)], 1)  # the step that copies the state
        times: dict[str, list[float]] = {}
        for run in range(args.runs):
            turn = tokens(10 + run, args.turn)
            seconds, outputs = ask([text + turn], 1, save=False)
            restored = outputs[0].kv_transfer_params["lola"]["restored_tokens"]
            assert restored == args.before, outputs[0].kv_transfer_params
            times.setdefault("a turn, ms", []).append(1e3 * seconds)
            if args.worker == "same process":
                seconds, _ = ask([turn], 1, save=False, **{"from": False})
                times.setdefault("its tokens alone, ms", []).append(1e3 * seconds)
        if args.worker == "same process":
            seconds, _ = ask([text + tokens(9, args.turn)], 1, save=False, **{"from": False})
            times["from nothing, ms"] = [1e3 * seconds]
        if args.worker == "new process":  # the first turn reads the file, later ones memory
            result["the first turn, ms"] = times["a turn, ms"][0]
        result |= {name: statistics.median(values) for name, values in times.items()}
    llm.llm_engine.engine_core.shutdown()
    return result


def main() -> None:
    """Run the engines one after the other, print what they found, write the JSON."""
    args = parse()
    if args.worker:
        print_result(worker(args))
        return
    with tempfile.TemporaryDirectory() as directory:
        os.environ["LOLA_BENCH_STATES"] = directory
        results = {name: run_worker(name) for name in WORKERS}
    for name, found in results.items():
        for what, value in found.items():
            print(f"{name:16} {what:24} {value:10.1f}")
    write_report(args, results)


if __name__ == "__main__":
    main()
