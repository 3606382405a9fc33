"""One sequence of hundreds of thousands of tokens: memory and time per token stay what they were.

    python -m tools.long_sequence --tokens 200000 --out long.json

Runs in this process on a tiny random model, or on `--model`, with random tokens or, with `--texts`,
on real text. A model whose positions end has them raised (what it then says means nothing; what it
costs does); one with a `context_shift` is served as it is. Memory is RssAnon + VmSwap. Times are
of the processor, which a busy neighbour changes little; those of the clock are told too.
`tools/endless.py` says whether such a model still predicts and recalls.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# oneDNN keeps something for every number of tokens that a step has had; see docs/reliability.md.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")

from vllm import LLM, SamplingParams, TokensPrompt

from lola_vllm.core import cpu
from lola_vllm.evaluation import summary
from lola_vllm.evaluation.models import LocalTokenizer
from tools.long_text import compose
from tools.support.memory import memory_mib
from tools.support.tiny import make_tiny

LOLA = {"window_size": 64, "sparse_cache_size": 128, "sink_size": 4, "context_shift": 1024}
DECODES = 64


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: a tiny random one, made here")
    parser.add_argument(
        "--lola-config", type=json.loads, default={}, metavar="JSON", help="keys that replace the "
        "model's"
    )  # fmt: skip
    parser.add_argument("--texts", type=Path, help="real text for --model; default: random tokens")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--every", type=int, default=10_000, help="tokens between two samples")
    parser.add_argument("--short", type=int, default=1000, help="context to compare decode with")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.texts and not args.model:
        parser.error("--texts: the tiny model has no tokenizer; give --model as well")
    least = max(2 * args.every, 3 * args.short)
    if args.tokens < least:
        parser.error(
            f"--tokens {args.tokens}: two samples of --every {args.every} are compared, and 3 "
            f"times --short {args.short} are read for warmth; give {least} or more"
        )
    return args


def random_text(tokens: int) -> list[int]:
    """A prompt of tokens that the tiny model has."""
    rng = random.Random(tokens)
    return [rng.randrange(1, 490) for _ in range(tokens)]


def run(llm: LLM, prompt: list[int], every: int) -> dict[str, Any]:
    """Prefill a prompt and decode after it."""
    tokens, core = len(prompt), llm.llm_engine
    params = SamplingParams(max_tokens=DECODES, temperature=0.0, ignore_eos=True, detokenize=False)
    core.add_request(str(tokens), TokensPrompt(prompt_token_ids=prompt), params)
    request = next(
        iter(core.engine_core.engine_core.scheduler.requests.values())
    )  # the only one there is
    samples: list[dict[str, float]] = []
    decodes: list[float] = []
    begin, clock, done = time.process_time(), time.perf_counter(), 0
    while core.has_unfinished_requests():
        start = time.process_time()
        core.step()
        now = time.process_time()
        if request.num_output_tokens > 1:
            decodes.append(now - start)
        elif request.num_computed_tokens >= min(done + every, tokens):
            computed = min(request.num_computed_tokens, tokens)
            sample = {
                "tokens": computed,
                "us_per_token": (now - begin) / (computed - done) * 1e6,
                "clock_us_per_token": (time.perf_counter() - clock) / (computed - done) * 1e6,
                "memory_mib": memory_mib(),
            }
            samples.append({key: round(value, 2) for key, value in sample.items()})
            begin, clock, done = now, time.perf_counter(), computed
    return {
        "prefill": samples,
        "decode_ms_per_token": round(statistics.median(decodes) * 1e3, 3),
        "memory_mib": round(memory_mib(), 2),
    }


def is_endless(model: Path, lola_config: dict[str, Any]) -> bool:
    """Whether a model's contexts shift instead of ending."""
    config = json.loads((model / "config.json").read_text())
    return bool({**config["lola_config"], **lola_config}.get("context_shift"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """A short sequence for warmth, the long one, and a short one before and after it."""
    longest = args.tokens + DECODES + 8
    with tempfile.TemporaryDirectory() as directory:
        model = args.model or make_tiny(Path(directory) / "tiny", LOLA)
        overrides: dict[str, Any] = {"lola_config": args.lola_config}
        if not is_endless(model, args.lola_config):
            overrides["max_position_embeddings"] = longest
        ids = random_text(args.tokens)
        if args.texts:  # of the model's tokenizer, which the tiny one has not
            ids = compose(LocalTokenizer(model), args.texts, args.tokens, args.tokens // 10).ids
        llm = LLM(
            str(model), skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False,
            dtype=(cpu.preferred_dtype({}) or "auto") if args.model else "float32",
            max_model_len=longest, max_num_seqs=1, max_num_batched_tokens=2048,
            num_gpu_blocks_override=3, kv_cache_memory_bytes=64 * 2**20, hf_overrides=overrides,
        )  # fmt: skip
        run(llm, ids[: 3 * args.short], args.every)
        short = run(llm, ids[: args.short], args.every)
        long = run(llm, ids[: args.tokens], args.every)
        after = run(llm, ids[: args.short], args.every)
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        states = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        state_bytes = states.spec.bytes_per_sequence
        assert states.num_states_in_use == 0
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    report = {
        "settings": settings,
        "state_bytes": state_bytes,
        "short": short,
        "long": long,
        "short_after": after,
    }
    return {**report, "faults": judge(report)}


def judge(report: dict[str, Any]) -> list[str]:
    """Memory may not grow with the sequence beyond the prompt's own ids, nor time per token."""
    long, faults = report["long"], []
    samples = long["prefill"]
    half = len(samples) // 2
    # vLLM keeps the ids in Python lists and arrays: some dozens of bytes per token, from the start.
    grown = max(s["memory_mib"] for s in samples[1:]) - samples[0]["memory_mib"]
    if grown > 8:
        faults.append(f"memory grew by {grown:.1f} MiB while the prompt was computed")
    first, second = (
        statistics.median(s["us_per_token"] for s in part)
        for part in (samples[:half], samples[half:])
    )
    if second > 1.5 * first:
        faults.append(f"time per token went from {first:.0f} to {second:.0f} us")
    decode = long["decode_ms_per_token"]
    short = max(report[name]["decode_ms_per_token"] for name in ("short", "short_after"))
    if decode > 1.5 * short:
        faults.append(f"a decode takes {decode} ms, {short} ms in a short context")
    return faults


def main() -> int:
    """Measure, print, write the JSON."""
    args = parse()
    report = measure(args)
    if args.out:
        summary.write(args.out, report, "tools.long_sequence")
    for sample in report["long"]["prefill"]:
        print(json.dumps(sample))
    print({key: report["long"][key] for key in ("decode_ms_per_token", "memory_mib")})
    for name in ("short", "short_after"):
        print(f"{name}: {report[name]['decode_ms_per_token']} ms")
    print("\n".join(report["faults"]) or "no fault")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
