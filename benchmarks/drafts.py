"""Speculative decoding beside plain decoding, in one run: milliseconds a token, and tokens a step.

    python benchmarks/drafts.py --out eval-results/drafts.json

Three kinds of answers are made greedily: an edit of code that stands in the prompt, a quotation of
a text that does, and plain chat. "ngram" is vLLM's own, "wrong" drafts tokens that no answer has,
which is what drafts cost where none is accepted. "suffix" is vLLM's own too, and runs where
`arctic-inference` is installed. Each way runs in a process of its own. The order is repeated
`--rounds` times and the best round is kept, since a shared machine only ever makes a run slower.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

from common import ROOT, best_of, parser_of, print_result, print_table, write_report

WAYS = ["plain", "ngram", "wrong"]
if importlib.util.find_spec("arctic_inference"):
    WAYS.append("suffix")
SOURCES = ("lola_vllm/core/ops/rollback.py", "lola_vllm/core/ops/rope_table.py")
CHATS = ("What is gravity?", "Tell me about the history of bread.")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, WAYS)
    parser.add_argument("--model", type=Path, default=ROOT / "models/qwen-lola")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--drafts", type=int, default=4, help="tokens of a draft, at most")
    parser.add_argument("--lookup", type=int, default=5, help="tokens that an n-gram has, at least")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile instead of eager")
    return parser.parse_args()


class WrongDrafts:
    """Drafts of a token that no answer here has: the last of the vocabulary."""

    def __init__(self, config: Any) -> None:
        self._count = config.speculative_config.num_speculative_tokens
        self._token = config.model_config.get_vocab_size() - 1

    def load_model(self, *_: Any) -> None:
        """There is none."""

    def propose(self, sampled: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """As many for each row whose prompt is at its end."""
        return [[self._token] * self._count if new else [] for new in sampled]


def requests() -> dict[str, list[str]]:
    """What is asked, by the kind of answer."""
    sources = [(ROOT / name).read_text() for name in SOURCES]
    texts = [source.split('"""')[1].strip() for source in sources]
    return {
        "edit": [f"Write this file again with one more comment:\n\n{s}" for s in sources],
        "quote": [f"Write this text again word for word:\n\n{text}" for text in texts],
        "chat": list(CHATS),
    }


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one way in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams, TokensPrompt

    drafts = {
        "plain": None,
        "ngram": {"method": "ngram", "prompt_lookup_min": args.lookup},
        "suffix": {"method": "suffix"},
        "wrong": {"method": "custom_class", "model": "drafts.WrongDrafts"},
    }[args.worker]
    if drafts is not None:
        drafts["num_speculative_tokens"] = args.drafts
    llm = LLM(
        str(args.model),
        dtype=args.dtype,
        enforce_eager=not args.compile,
        max_model_len=4096,
        max_num_seqs=max(args.batches),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**30,
        speculative_config=drafts,
        disable_log_stats=False,
    )
    tokenizer, engine, result = llm.get_tokenizer(), llm.llm_engine, {}
    params = SamplingParams(max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
    for kind, asked in requests().items():
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            for text in asked
        ]
        for batch in args.batches:
            for number in range(batch):
                ids = prompts[number % len(prompts)]
                engine.add_request(f"{kind}{number}", TokensPrompt(prompt_token_ids=ids), params)
            lengths: dict[str, int] = {}
            steps, begun, first = 0, 0.0, 0
            while engine.has_unfinished_requests():
                for output in engine.step():
                    lengths[output.request_id] = len(output.outputs[0].token_ids)
                if begun:
                    steps += 1
                elif len(lengths) == batch:  # all prompts are read
                    begun, first = time.perf_counter(), sum(lengths.values())
            made = sum(lengths.values()) - first
            result[f"ms_per_token/{kind}/{batch}"] = (time.perf_counter() - begun) / made * 1e3
            result[f"tokens_per_step/{kind}/{batch}"] = made / steps / batch
    return result


def main() -> None:
    """Run all ways, print the table, write the JSON."""
    args = parse()
    if args.worker:
        print_result(worker(args))
        return
    best = best_of(args.rounds, WAYS)
    print_table(best)
    write_report(args, best)


if __name__ == "__main__":
    main()
