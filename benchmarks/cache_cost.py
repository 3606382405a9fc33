"""What the sparse cache and its rescoring cost a whole model: time to first token, decode steps.

    python benchmarks/cache_cost.py --out eval-results/cache_cost.json

Prefill: the time to the first token of one prompt, with and without a sparse cache. Decode: steps
of a batch whose sequences all reach their update points at once, so that a step either rescores
every sequence or none. An interval's average step, over a step that rescores nothing, is the cost
of rescoring. Intervals are of 2 tokens or more: with an update after every token there is no such
step.

Every case runs in a process of its own, one after the other; the order is repeated `--rounds`
times, and the best time of each case counts.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import Any

from common import ROOT, print_result, run_worker, write_report

WINDOW = 64  # tokens


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--sparse-cache-size", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens")
    parser.add_argument("--repeats", type=int, default=4, help="prompts per process")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--intervals", type=int, nargs="+", default=[64])
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[1024, 4096],
        help="tokens before the decode steps",
    )
    parser.add_argument("--steps", type=int, default=192, help="decode steps per case")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def engine(args: argparse.Namespace, lola_config: dict[str, int], tokens: int, seqs: int) -> Any:
    """An engine in this process that takes all of `tokens` prompt tokens in one step."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    llm = LLM(
        str(args.model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=8192,
        max_num_seqs=seqs,
        max_num_batched_tokens=max(8192, tokens),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**30,
        hf_overrides={"lola_config": lola_config},
    )
    return llm.llm_engine


@functools.cache
def text_ids(model: Path) -> list[int]:
    """Tokens of real text, the project's own documents: on noise more pairs need rescoring."""
    from transformers import AutoTokenizer

    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    ids: list[int] = AutoTokenizer.from_pretrained(model)(text, verbose=False)["input_ids"]
    return ids


def submit(args: argparse.Namespace, engine: Any, name: str, length: int, tokens: int) -> None:
    """Queue a prompt of so many tokens from another place of the text for each name."""
    from vllm import SamplingParams, TokensPrompt

    found = text_ids(args.model)
    start = 97 * int(name)
    if start + length > len(found):
        raise SystemExit(f"--prompt {length}: the documents have {len(found)} tokens only")
    ids = found[start : start + length]
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    engine.add_request(name, TokensPrompt(prompt_token_ids=ids), params)


def prefill(args: argparse.Namespace, lam: int) -> dict[str, float]:
    """Seconds to the first token."""
    llm = engine(args, {"sparse_cache_size": lam}, args.prompt, 1)
    times = []
    for repeat in range(args.repeats + 1):
        submit(args, llm, f"{repeat}", args.prompt, 1)
        begin = time.perf_counter()
        while llm.has_unfinished_requests():
            llm.step()
        times.append(time.perf_counter() - begin)
    return {f"first_token_s/lam {lam}": min(times[1:])}


def decode(args: argparse.Namespace, interval: int, batch: int, length: int) -> dict[str, float]:
    """Milliseconds of a step at an update point and of one between two of them."""
    config = {
        "sparse_cache_size": args.sparse_cache_size,
        "window_size": WINDOW,
        "update_interval": interval,
    }
    llm = engine(args, config, batch * length, batch)
    for i in range(batch):
        submit(args, llm, f"{i}", length, args.steps + 2)
    llm.step()  # all prompts at once: every sequence is as long as the others from here on
    times: dict[str, list[float]] = {}
    for step in range(1, args.steps + 1):
        begin = time.perf_counter()
        outputs = llm.step()
        took = (time.perf_counter() - begin) * 1e3
        if [len(o.outputs[0].token_ids) for o in outputs] != [step + 1] * batch:
            raise SystemExit(f"sequences of different length in step {step}")
        # The step brings the token that the one before chose into the state.
        kind = "update" if (length + step) % interval == 0 else "quiet"
        times.setdefault(kind, []).append(took)
    return {
        f"{kind}_ms/interval {interval}/batch {batch}/context {length}": statistics.median(took)
        for kind, took in times.items()
    }


def worker(args: argparse.Namespace) -> dict[str, float]:
    """Measure one case in this process."""
    kind, *numbers = args.worker.split("/")
    if kind == "prefill":
        return prefill(args, int(numbers[0]))
    return decode(args, *map(int, numbers))


def ratios(args: argparse.Namespace, best: dict[str, float]) -> dict[str, float]:
    """What is asked of the measured times."""
    lam = args.sparse_cache_size
    found = {
        "first_token, with the cache / without": best[f"first_token_s/lam {lam}"]
        / best["first_token_s/lam 0"]
    }
    for interval, batch, context in itertools.product(args.intervals, args.batches, args.contexts):
        case = f"batch {batch}/context {context}"
        update = best[f"update_ms/interval {interval}/{case}"]
        quiet = best[f"quiet_ms/interval {interval}/{case}"]
        step = (update + (interval - 1) * quiet) / interval
        found[f"step, rescoring / none, interval {interval}/{case}"] = step / quiet
    return found


def main() -> None:
    """Run all cases, print them, write the JSON."""
    args = parse()
    shortest = args.sparse_cache_size + 2 * WINDOW  # evictions lag by an interval, at most a window
    if min(args.contexts) <= shortest:
        raise SystemExit(f"--contexts {min(args.contexts)}: nothing is rescored up to {shortest}")
    if args.worker:
        print_result(worker(args))
        return
    cases = [f"prefill/{lam}" for lam in (0, args.sparse_cache_size)]
    decodes = itertools.product(args.intervals, args.batches, args.contexts)
    cases += [f"decode/{i}/{b}/{c}" for i, b, c in decodes]
    best: dict[str, float] = {}
    for _ in range(args.rounds):
        for case in cases:
            for key, value in run_worker(case).items():
                best[key] = min(value, best.get(key, value))
    results = {"best": best, "ratios": ratios(args, best)}
    for part in results.values():
        for key, value in part.items():
            print(f"{key:60}{value:10.3f}")
    write_report(args, results)


if __name__ == "__main__":
    main()
