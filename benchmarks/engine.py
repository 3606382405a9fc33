"""LoLA beside stock vLLM on the same model, in one run: start-up, prefill, decode.

    python benchmarks/engine.py --out eval-results/engine.json

and, where asked for, beside llama.cpp, with weights of fewer bits:

    python benchmarks/engine.py --engines stock lola llama.cpp --weights int4

Each engine runs in a process of its own, with the same flags, one after the other; the order is
repeated `--rounds` times and the best round of each cell is kept, since a shared machine only ever
makes a run slower. Decode is timed step by step with every sequence in its steady state; the
median step counts. Figures of different machines, or of different runs, do not compare: read the
ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import llamacpp
from common import (
    ENGINES,
    MIB,
    ROOT,
    best_of,
    parser_of,
    print_result,
    print_table,
    tokens,
    write_report,
)

LLAMA = "llama.cpp"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, (*ENGINES, LLAMA))
    parser.add_argument("--lola", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--stock", type=Path, default=ROOT / "models/smollm2-base")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed per cell")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile instead of eager")
    parser.add_argument(
        "--engines", nargs="+", choices=(*ENGINES, LLAMA), default=list(ENGINES), help="which"
    )
    parser.add_argument(
        "--weights",
        choices=("int8", "int4"),
        help="of LoLA and, where they are int4, of stock vLLM, which has no int8 like it on a CPU",
    )
    parser.add_argument(
        "--llama-format", choices=llamacpp.FORMATS, default="Q4_1", help="of llama.cpp's weights"
    )
    parser.add_argument(
        "--llama-base", default="", help="llama.cpp's model, by its name in `lola-vllm demo-model`"
    )
    return parser.parse_args()


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one engine in this process."""
    if args.worker == LLAMA:
        return llamacpp.measure(args)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    begin = time.perf_counter()
    from vllm import LLM, SamplingParams, TokensPrompt

    from lola_vllm.core.config import DecoderConfig

    longest = max(args.contexts) + args.steps + max(args.batches) + 16
    lola = args.worker == "lola"
    config = json.loads((args.stock / "config.json").read_text())
    endless = lola and DecoderConfig.from_pretrained(args.lola).lola.context_shift
    overrides = {}
    model = args.lola if lola else args.stock
    if lola or args.weights == "int4":
        model = checkpoint(model, args.weights)
    if longest > config["max_position_embeddings"] and not endless:
        overrides["max_position_embeddings"] = longest  # speed is asked, not sense
    llm = LLM(
        str(model),
        dtype=args.dtype,
        enforce_eager=not args.compile,
        max_model_len=longest,
        max_num_seqs=max(args.batches),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=max(2 * 2**30, pool_bytes(config, longest, max(args.batches))),
        hf_overrides=overrides,
    )
    result: dict[str, Any] = {"start_s": time.perf_counter() - begin}
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    if lola:
        result["mib_per_sequence"] = manager.spec.bytes_per_sequence / MIB
    pool_tokens = scheduler.kv_cache_manager.block_pool.num_gpu_blocks * manager.block_size
    for context in args.contexts:  # in the same pool
        fit = manager.num_states if lola else pool_tokens // context
        result[f"sequences_that_fit/{context}"] = fit

    engine, counter = llm.llm_engine, iter(range(10**9))

    def submit(length: int, new: int) -> None:
        number = next(counter)
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        prompt = TokensPrompt(prompt_token_ids=tokens(number, length))
        engine.add_request(str(number), prompt, params)

    def drain() -> None:
        while engine.has_unfinished_requests():
            engine.step()

    submit(64, 4)  # first-use costs are not what is measured
    drain()
    for context in args.contexts:
        submit(context, 1)
        begin = time.perf_counter()
        drain()
        result[f"prefill_tokens_per_s/{context}"] = context / (time.perf_counter() - begin)
        for batch in args.batches:
            for _ in range(batch):
                submit(context, args.steps + batch + 8)
            ready: set[str] = set()
            while len(ready) < batch:
                ready |= {o.request_id for o in engine.step()}
            times = []
            for _ in range(args.steps):
                begin = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - begin)
            result[f"decode_tokens_per_s/{context}/{batch}"] = batch / statistics.median(times)
            engine.abort_request([str(i) for i in ready])
            drain()
    return result


def checkpoint(model: Path, weights: str | None) -> Path:
    """The model, or it in fewer bits: made beside it on first use."""
    if weights is None:
        return model
    from lola_vllm.models.quantize import quantize_checkpoint

    quantized = model.with_name(f"{model.name}-{weights}")
    made_of = model / "model.safetensors"
    made = quantized / "model.safetensors"
    if not made.exists() or made.stat().st_mtime < made_of.stat().st_mtime:
        quantize_checkpoint(model, quantized, weights, force=True)  # type: ignore[arg-type]
    return quantized


def pool_bytes(config: dict[str, Any], longest: int, sequences: int) -> int:
    """Room for the largest batch in a full KV cache of the stock model, with a margin."""
    d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    per_token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * d
    return int(1.2 * per_token * (longest + 128) * sequences)


def main() -> None:
    """Run both engines, print the table, write the JSON."""
    args = parse()
    if args.worker:
        print_result(worker(args))
        return
    best = best_of(args.rounds, args.engines)
    print_table(best)
    write_report(args, best)


if __name__ == "__main__":
    main()
