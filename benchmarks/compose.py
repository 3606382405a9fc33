"""What it takes to compose states of documents that were read apart, beside reading them.

    python benchmarks/compose.py --documents 3 --tokens 2000

Times are of one thread: processor time, and time on the clock. Reading is that of the transformers
model in the dtype of the checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, write_report
from transformers import AutoModelForCausalLM

from lola_vllm.engine.hf import LolaCache


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2000, help="of each document")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


@torch.no_grad()
def read(model: Any, tokens: int) -> LolaCache:
    """The state of a document of random tokens."""
    cache = LolaCache(model.config)
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    began = time.process_time()
    caches = [read(model, args.tokens) for _ in range(args.documents)]
    reading = time.process_time() - began
    rows = [cache.rows()[0] for cache in caches]
    composer = model.composer(caches[0].sequence)
    lengths, clock, processor = [args.tokens] * args.documents, [], []
    for run in range(args.runs + 2):
        start = time.perf_counter(), time.process_time()
        composer.compose(rows, lengths)
        if run >= 2:  # the first ones take memory from the system
            clock.append(1000 * (time.perf_counter() - start[0]))
            processor.append(1000 * (time.process_time() - start[1]))
    result = {
        "documents": args.documents,
        "tokens": args.tokens,
        "reading_ms": 1000 * reading,
        "compose_ms": statistics.median(clock),
        "compose_processor_ms": statistics.median(processor),
        "state_mib": len(rows[0]) / 2**20,
    }
    for name, value in result.items():
        print(f"{name:24} {value:10.1f}")
    write_report(args, result)


if __name__ == "__main__":
    main()
