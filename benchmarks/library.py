"""How often a question finds its document among many, and what it answers from composed states.

    python benchmarks/library.py --documents 32 --questions 16 --seed 1 --text shakespeare_milton

Documents are passages of a text. Each question asks for a number that is hidden in one of them. It
chooses by `lola_vllm.library.choose`, with both scores, and is asked of the document alone and of
the three that were chosen, composed. `--in-a-row` also reads these three in a row. Questions of
seed 0 chose between the scores; others report.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, write_report
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_vllm.hf import LolaCache
from lola_vllm.hf.question import queries_of
from lola_vllm.library.choose import NEUTRAL, ScoreName, choose
from lola_vllm.library.keys import DocumentKeys, reading_heads

WORDS = [
    *("amber", "brook", "cedar", "dawn", "ember", "fjord", "grove", "heron", "iris", "jade"),
    *("kelp", "lotus", "maple", "north", "ocean", "pearl", "quartz", "river", "stone", "tulip"),
    *("umber", "violet", "willow", "yarrow", "zephyr"),
]
# (what is hidden, question): the first is of seed 0, which chose the score.
FORMS = (
    (
        " One of the special magic numbers for {key} is: {number}.",
        "\nWhat is the special magic number for {key} mentioned in the provided text? The special "
        "magic number for {key} mentioned in the provided text is",
    ),
    (
        " The telephone number of the {key} office is {number}.",
        "\nQuestion: Which number do I dial to reach the {key} office?\nAnswer: The telephone "
        "number of the {key} office is",
    ),
)
SCORES: tuple[ScoreName, ...] = ("contrast", "share")
ANSWER_TOKENS = 9


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--text", default="jane_austen", help="a file of models/texts")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2000, help="of each document")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-a-row", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


class Reader:
    """The model, and what it reads."""

    def __init__(self, model: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        self.rope = self.model.model.rope_table()

    @torch.no_grad()
    def read(self, ids: list[int], cache: LolaCache | None = None) -> tuple[LolaCache, int]:
        """The cache after these tokens, and the likeliest next one."""
        cache = LolaCache(self.model.config) if cache is None else cache
        out = self.model(
            input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return cache, int(out.logits[0, -1].argmax())

    def keys(self, cache: LolaCache) -> DocumentKeys:
        """Those of a document."""
        n = cache.get_seq_length()
        return DocumentKeys.of_state(cache.sequence, cache.rows()[0], n, self.rope)

    def ask(self, cache: LolaCache, question: list[int]) -> tuple[str, float]:
        """The answer, and the seconds to its first token."""
        began = time.perf_counter()
        cache, token = self.read(question, copy.deepcopy(cache))
        first, tokens = time.perf_counter() - began, [token]
        while len(tokens) < ANSWER_TOKENS:
            cache, token = self.read(tokens[-1:], cache)
            tokens.append(token)
        return self.tokenizer.decode(tokens), first


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    chance, reader = random.Random(args.seed), Reader(args.model)
    encode = reader.tokenizer.encode
    text = (ROOT / f"models/texts/{args.text}.txt").read_text()
    hidden, asked = FORMS[0 if args.seed == 0 else 1]

    def passage() -> list[int]:
        start = chance.randrange(len(text) - 8 * args.tokens)
        found: list[int] = encode(text[start : start + 8 * args.tokens])[: args.tokens]
        return found

    passages = [passage() for _ in range(args.documents)]
    caches = [reader.read(ids)[0] for ids in passages]
    keys = [reader.keys(cache) for cache in caches]
    neutral = queries_of(reader.model, caches[0], encode(NEUTRAL))
    found: dict[str, float] = {f"{score} first": 0 for score in SCORES}
    found |= {f"{score} among three": 0 for score in SCORES}
    answers: dict[str, float] = {"alone": 0, "composed": 0}
    timed = ["read one", "choose", "compose", "first token"] + ["in a row"] * args.in_a_row
    seconds = dict.fromkeys(timed, 0.0)
    for number in range(args.questions):
        right = chance.randrange(1, args.documents)
        key, digits = (
            f"{chance.choice(WORDS)}-{chance.choice(WORDS)}",
            str(chance.randrange(10**6, 10**7)),
        )
        needle = encode(hidden.format(key=key, number=digits))
        room, at = args.tokens - len(needle), chance.random()
        place = int(room * at)
        ids = passages[right][:place] + needle + passages[right][place:room]
        began = time.perf_counter()
        cache = reader.read(ids)[0]
        seconds["read one"] += time.perf_counter() - began
        here = [*keys[:right], reader.keys(cache), *keys[right + 1 :]]
        there = [*caches[:right], cache, *caches[right + 1 :]]
        texts = [*passages[:right], ids, *passages[right + 1 :]]
        question = encode(asked.format(key=key))
        began = time.perf_counter()
        queries = queries_of(reader.model, caches[0], question)
        chosen = {score: choose(queries, neutral, here, 3, score) for score in SCORES}
        seconds["choose"] += (time.perf_counter() - began) / len(SCORES)
        for score, choices in chosen.items():
            order = [choice.document for choice in choices]
            found[f"{score} first"] += order[0] == right
            found[f"{score} among three"] += right in order
        answers["alone"] += digits in reader.ask(cache, question)[0]
        best = [choice.document for choice in chosen["contrast"]][::-1]  # the best one last
        began = time.perf_counter()
        composed = LolaCache.compose([there[i] for i in best], reader.model)
        seconds["compose"] += time.perf_counter() - began
        answer, first = reader.ask(composed, question)
        answers["composed"] += digits in answer
        seconds["first token"] += first
        if args.in_a_row:
            began = time.perf_counter()
            row = reader.read([token for i in best for token in texts[i]])[0]
            seconds["in a row"] += time.perf_counter() - began
            right_answer = digits in reader.ask(row, question)[0]
            answers["in a row"] = answers.get("in a row", 0) + right_answer
        print(number + 1, right, best[::-1], repr(answer), found, answers, flush=True)
    result = found | {f"answers {name}": count for name, count in answers.items()}
    result |= {f"{name} s": total / args.questions for name, total in seconds.items()}
    result |= {
        "heads": len(reading_heads(caches[0].sequence)),
        "key MiB": sum(x.nbytes for x in keys) / len(keys) / 2**20,
        "state MiB": caches[0].sequence.row_bytes / 2**20,
    }
    for name, value in result.items():
        print(f"{name:28} {value:10.2f}")
    write_report(args, result)


if __name__ == "__main__":
    main()
