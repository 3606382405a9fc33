"""What prefix caching saves: prompts that share a prefix, on LoLA and on stock vLLM.

    python benchmarks/prefix.py --out eval-results/prefix.json

Prompts share their first `--shared` tokens and go on with `--own` of their own. Each engine answers
them twice with the same flags: without prefix caching, and with it (the first prompt, which finds
nothing, apart). Times are to the first token; `answers_that_differ` counts first tokens that a hit
changed, as rounding may where a choice is close.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

from common import ENGINES, ROOT, print_result, print_table, run_worker, write_report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lola", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--stock", type=Path, default=ROOT / "models/smollm2-base")
    parser.add_argument("--shared", type=int, default=2048, help="tokens")
    parser.add_argument("--own", type=int, default=64, help="tokens")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def worker(args: argparse.Namespace) -> dict[str, float]:
    """Measure one engine in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams, TokensPrompt

    def prompt(number: int) -> TokensPrompt:
        shared = [(7 * i) % 40000 + 100 for i in range(args.shared)]
        own = [(31 * number + 11 * i) % 40000 + 100 for i in range(args.own)]
        return TokensPrompt(prompt_token_ids=shared + own)

    params = SamplingParams(max_tokens=1, temperature=0.0)
    result: dict[str, float] = {}
    first_tokens = []
    for caching in (False, True):
        llm = LLM(
            str(args.lola if args.worker == "lola" else args.stock),
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=args.shared + args.own + 64,
            max_num_seqs=4,
            enable_prefix_caching=caching,
            kv_cache_memory_bytes=2**30,
            disable_log_stats=False,
        )
        # First-use costs are not what is measured.
        llm.generate(TokensPrompt(prompt_token_ids=list(range(100, 400))), params, use_tqdm=False)
        before = counters(llm)
        times, tokens = [], []
        for number in range(args.prompts):
            begin = time.perf_counter()
            (output,) = llm.generate(prompt(number), params, use_tqdm=False)
            times.append((time.perf_counter() - begin) * 1e3)
            tokens.append(output.outputs[0].token_ids[0])
        first_tokens.append(tokens)
        if caching:
            asked, hit = (b - a for a, b in zip(before, counters(llm), strict=True))
            result["first_prompt_ms"] = times[0]
            result["hit_ms"] = statistics.median(times[1:])
            result["hit_rate_percent"] = 100 * hit / asked
        else:
            result["miss_ms"] = statistics.median(times)
        llm.llm_engine.engine_core.shutdown()
    result["speed_up"] = result["miss_ms"] / result["hit_ms"]
    result["answers_that_differ"] = sum(a != b for a, b in zip(*first_tokens, strict=True))
    return result


def counters(llm: object) -> tuple[int, int]:
    """Prompt tokens that were looked up and found so far."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}  # type: ignore[attr-defined]
    return values["vllm:prefix_cache_queries"], values["vllm:prefix_cache_hits"]


def main() -> None:
    """Run both engines, print the table, write the JSON."""
    args = parse()
    if args.worker:
        print_result(worker(args))
        return
    results = {name: run_worker(name) for name in ENGINES}
    print_table(results)
    write_report(args, results)


if __name__ == "__main__":
    main()
