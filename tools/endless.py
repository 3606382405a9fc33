"""One text of a million tokens: does a model still predict and recall at its end?

    python -m tools.endless --model models/smollm2-lola --texts models/texts \
        --lola-config '{"context_shift": 2048}' --out endless.json

Reads one composed text in transformers, with the serving ops and one state. Reports memory and time
per token in windows, perplexity of the first and of the last tokens, and needles: sentences with a
number, at equal spaces, asked for when so many tokens have followed. Each needle is put into a copy
of the state, which reads the text on from there. So no needle stands between another and its
question. The last tokens are also read with a new state, as their text may be harder or easier than
that of the first.

`tools/long_sequence.py` puts such a text through vLLM, for memory and time there.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lola_vllm.core import cpu
from lola_vllm.evaluation import EvalError, summary
from lola_vllm.evaluation.models import Tokenizer
from lola_vllm.evaluation.reader import PIECE, Run, load
from lola_vllm.evaluation.results import fingerprint
from lola_vllm.evaluation.settings import Setting, check, with_positions
from lola_vllm.evaluation.tasks import NEEDLE, NEEDLE_ANSWER, draw_key
from lola_vllm.models.files import read_json
from tools.long_text import compose
from tools.support.memory import memory_mib

ANSWER_TOKENS = 16
QUESTION = "\nWhat is the special magic number for {key} mentioned in the provided text? "


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="as 'lola-vllm texts' writes it")
    parser.add_argument("--lola-config", default="{}", metavar="JSON")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--edge", type=int, default=100_000, help="first and last tokens, measured")
    parser.add_argument("--every", type=int, default=10_000, help="tokens between two samples")
    parser.add_argument("--needle-every", type=int, default=50_000)
    parser.add_argument(
        "--ask-after", type=int, nargs="*", default=[1000, 4000, 16_000], metavar="N"
    )
    parser.add_argument("--dtype", help="default: the fast one of this machine")
    parser.add_argument("--worse", type=float, default=1.25, help="what a ratio may be, at most")
    parser.add_argument("--growth-mib", type=float, default=32, help="what memory may grow by")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Needle:
    """A number under a key, put in after `at` tokens of the text."""

    at: int
    key: str
    value: str

    @property
    def sentence(self) -> str:
        """What the text says."""
        return " " + NEEDLE.format(kind="number", key=self.key, value=self.value) + " "

    @property
    def question(self) -> str:
        """What a copy of the state is asked."""
        answer = NEEDLE_ANSWER.format(kind="number", key=self.key)
        return QUESTION.format(key=self.key) + answer


def draw_needles(tokens: int, every: int) -> list[Needle]:
    """Needles at equal spaces, with different keys."""
    rng, found = random.Random(tokens), list[Needle]()
    for at in range(every, tokens, every):
        key = draw_key(rng)
        while key in {needle.key for needle in found}:
            key = draw_key(rng)
        found.append(Needle(at, key, str(rng.randint(10**6, 10**7 - 1))))
    return found


class Reading:
    """A text on its way through a model.

    Args:
        model: of `lola_vllm.evaluation.reader.load`. ids: the text. args: of `parse`.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer, ids: list[int], args: argparse.Namespace
    ) -> None:
        self.model, self.tokenizer, self.ids, self.args = model, tokenizer, ids, args
        self.run = Run(model)
        self.samples: list[dict[str, float]] = []
        self.asked: list[dict[str, Any]] = []
        self.nats = {"first": 0.0, "last": 0.0}
        self.counted = {"first": 0, "last": 0}

    def read(self) -> None:
        """Read all of it."""
        args, total = self.args, len(self.ids)
        needles = draw_needles(total, args.needle_every)
        stops = {*range(args.every, total, args.every), args.edge, total - args.edge, total}
        stops |= {needle.at for needle in needles}
        done, since, spent, clock = 0, 0, 0.0, 0.0
        for stop in sorted(stops):
            start = time.process_time(), time.perf_counter()
            self._feed(done, stop)
            spent += time.process_time() - start[0]
            clock += time.perf_counter() - start[1]
            done = stop
            if done - since >= args.every:
                sample = {
                    "tokens": done,
                    "us_per_token": spent / (done - since) * 1e6,
                    "clock_us_per_token": clock / (done - since) * 1e6,
                    "memory_mib": memory_mib(),
                }
                self.samples.append({key: round(value, 2) for key, value in sample.items()})
                print(json.dumps(self.samples[-1]), flush=True)
                since, spent, clock = done, 0.0, 0.0
            for needle in needles:
                if needle.at == done:
                    self._hide(needle)

    def _feed(self, start: int, stop: int) -> None:
        """Tokens from start to stop, predicted where they count."""
        part = self.ids[start:stop]
        edge, total = self.args.edge, len(self.ids)
        name = "first" if stop <= edge else "last" if start >= total - edge else None
        if name is None:
            self.run.read(part)
            return
        for at in range(0, len(part), PIECE):
            values = self.run.predict(part[at : at + PIECE])
            self.nats[name] -= sum(value.logprob for value in values)
            self.counted[name] += len(values)

    def _hide(self, needle: Needle) -> None:
        """Read on from a needle in a copy of the state, and ask for it."""
        run, at = self.run.copy(), needle.at
        run.read(self.tokenizer.encode(needle.sentence, special=False))
        for after in sorted(self.args.ask_after):
            if needle.at + after > len(self.ids):
                return
            run.read(self.ids[at : needle.at + after])
            at = needle.at + after
            copy = run.copy()
            copy.read(self.tokenizer.encode(needle.question, special=False))
            answer = self.tokenizer.decode(copy.answer(ANSWER_TOKENS))
            found = {"needle_at": needle.at, "after": after, "exact": needle.value in answer}
            self.asked.append({**found, "expected": needle.value, "answer": answer})
            print(json.dumps(self.asked[-1], ensure_ascii=False), flush=True)

    def afresh(self) -> float:
        """Perplexity of the last tokens, read with a new state."""
        run, nats, count = Run(self.model), 0.0, 0
        part = self.ids[len(self.ids) - self.args.edge :]
        for at in range(0, len(part), PIECE):
            values = run.predict(part[at : at + PIECE])
            nats -= sum(value.logprob for value in values)
            count += len(values)
        return math.exp(nats / count)

    def perplexity(self, name: str) -> float:
        """Of the "first" or the "last" tokens."""
        return math.exp(self.nats[name] / self.counted[name])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Read the text, and what there is to say of it.

    Raises:
        EvalError: options that do not fit each other, a model or texts that cannot be used.
    """
    if not 0 < args.edge <= args.tokens // 2:
        raise EvalError(f"--edge {args.edge}: must be from 1 to half of --tokens {args.tokens}")
    from lola_vllm.evaluation.models import LocalTokenizer

    tokenizer = LocalTokenizer(args.model)
    setting = Setting("endless", args.model, json.loads(args.lola_config))
    setting = with_positions(setting, args.tokens + args.tokens // 10)
    check(setting, args.tokens)
    text = compose(tokenizer, args.texts, args.tokens, args.edge)
    dtype = args.dtype or cpu.preferred_dtype(read_json(args.model / "config.json")) or "auto"
    reading = Reading(load(setting, dtype), tokenizer, text.ids, args)
    reading.read()
    first, last, afresh = reading.perplexity("first"), reading.perplexity("last"), reading.afresh()
    recalled: dict[int, list[bool]] = {}
    for row in reading.asked:
        recalled.setdefault(row["after"], []).append(row["exact"])
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    report = {
        "settings": settings,
        "fingerprint": fingerprint(args.model),
        "text": text.about,
        "untrained_positions": setting.positions is not None,
        "samples": reading.samples,
        "perplexity": {
            "first": first, "last": last, "last_afresh": afresh,
            "last_over_first": last / first, "last_over_afresh": last / afresh,
        },
        "needles": {
            f"{after}": {"exact": sum(rows), "asked": len(rows)}
            for after, rows in recalled.items()
        },
        "asked": reading.asked,
    }  # fmt: skip
    return {**report, "faults": judge(report, args)}


def judge(report: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Memory and time per token may not grow, nor perplexity against the same text read afresh."""
    samples, faults = report["samples"], []
    ratio = report["perplexity"]["last_over_afresh"]
    if ratio > args.worse:
        faults.append(f"the last tokens' perplexity is {ratio:.2f} times that of a new state")
    if len(samples) > 3:
        grown = max(s["memory_mib"] for s in samples[1:]) - samples[0]["memory_mib"]
        if grown > args.growth_mib:
            faults.append(f"memory grew by {grown:.1f} MiB")
        half = len(samples) // 2
        first, second = (
            statistics.median(s["us_per_token"] for s in part)
            for part in (samples[:half], samples[half:])
        )
        if second > 1.5 * first:
            faults.append(f"time per token went from {first:.0f} to {second:.0f} us")
    return faults


def main() -> int:
    """Measure, print, write the JSON and a summary without answers beside it."""
    args = parse()
    try:
        report = measure(args)
    except (EvalError, ValueError) as error:
        print(f"tools.endless: error: {error}", file=sys.stderr)
        return 2
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        summary.write(args.out.with_suffix(".summary.json"), report, "tools.endless")
    print(json.dumps({key: report[key] for key in ("text", "perplexity", "needles")}, indent=1))
    print("\n".join(report["faults"]) or "no fault")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
