"""How often a long text's own past answers, where a part of it is brought back for a question.

    python benchmarks/past.py --seed 1 --text web_bible --dir /tmp/past-1

One text is read on and on, in segments of `--tokens` tokens. The first `--questions` of them have a
number in a sentence each. It is asked for at once, and `--back` tokens later. At once:

- `apart`: the segment read apart, alone: what the others are compared with;
- `at once`: the state of the text at the segment's end, the present;
- `beside another`: the present and another segment with a number behind it.

And later:

- `present`: the state of the text then;
- `present, apart` and `apart, present`: with the segment read apart, composed in this order;
- `present, kept`: with the state that the text had at the segment's end.

Both times `found` is whether the question finds its segment among all, and `recalled` the answer of
the present and what it finds, as `lola_vllm.engine.hf.past` does it.

`--dir` gets states and answers, and goes on where it was left when the same command is run again.
Seeds 0, 10 and above chose the rule; others report.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROOT, write_report
from library import Reader
from library_corpus import DEVELOPMENT_NEEDLES, NEEDLE, WORDS, development

from lola_vllm.engine.hf import LolaCache
from lola_vllm.engine.hf.past import Past
from lola_vllm.memory.documents.keys import DocumentKeys


class Question(NamedTuple):
    """What is asked of a segment, and the number that answers it."""

    segment: int
    text: str
    answer: str


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--text", default="jane_austen", help="a file of models/texts")
    parser.add_argument("--tokens", type=int, default=2000, help="of a segment")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--back", type=int, nargs="+", default=[16_000, 64_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, required=True, help="for states and answers")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if any(back < args.tokens or back % args.tokens for back in args.back):
        parser.error(f"--back {args.back}: multiples of --tokens, {args.tokens}")
    return args


def make(
    text: str,
    encode: Callable[[str], list[int]],
    *,
    segments: int,
    tokens: int,
    questions: int,
    seed: int,
) -> tuple[list[list[int]], list[Question]]:
    """A text in segments of so many tokens. The first ones have a number each."""
    chance = random.Random(seed)
    needle = DEVELOPMENT_NEEDLES[seed % 3] if development(seed) else NEEDLE
    subjects = [f"{a}-{b}" for a in WORDS for b in WORDS]
    chance.shuffle(subjects)
    start = chance.randrange(len(text) // 2)  # so a longer text goes on from a shorter one
    ids = encode(text[start : start + 8 * segments * tokens])
    if len(ids) < segments * tokens:
        raise SystemExit(f"the text has {len(ids)} tokens behind its start; take a longer one")
    cut, asked, at = [], [], 0
    for number in range(segments):
        hidden: list[int] = []
        if number < questions:
            digits = str(chance.randrange(10**6, 10**7))
            told, question = (x.format(key=subjects[number], number=digits) for x in needle)
            hidden = encode(told)
            asked.append(Question(number, question, digits))
        body = ids[at : at + tokens - len(hidden)]
        at += len(body)
        place = int(len(body) * chance.random())
        cut.append(body[:place] + hidden + body[place:])
    return cut, asked


class Text:
    """A text that was read on and on: its state at the end of each segment, and segments apart."""

    def __init__(self, reader: Reader, segments: list[list[int]], directory: Path) -> None:
        self.reader, self.segments, self.directory = reader, segments, directory
        self.past = Past(reader.model, len(segments[0]))

    def read(self, count: int) -> None:
        """Read so many segments, those that are not there yet."""
        done = sum(self._path("kept", i).exists() for i in range(len(self.segments)))
        if done < count:
            self.go_to(done)
        for index in range(done, count):
            self.past.read(self.segments[index])
            self.past.keys[index].write(self.directory / f"{index}.keys")
            self.past.cache.save(self._path("kept", index), self.past.tokens)
            print(f"read {index + 1} of {count}", flush=True)

    def go_to(self, count: int) -> Past:
        """The text as it was after so many segments."""
        past, config = self.past, self.reader.model.config
        past.cache = self.kept(count - 1) if count else LolaCache(config)
        past.tokens = [token for segment in self.segments[:count] for token in segment]
        past.keys = [DocumentKeys.read(self.directory / f"{i}.keys") for i in range(count)]
        past.first = self.kept(0) if count else None
        return past

    def kept(self, index: int) -> LolaCache:
        """The state of the text at a segment's end."""
        return LolaCache.load(self._path("kept", index), self.reader.model.config)[0]

    def apart(self, index: int) -> LolaCache:
        """That of a segment that is read apart."""
        path = self._path("apart", index)
        if not path.exists():
            ids = self.segments[index]
            self.reader.read(ids, cache := LolaCache(self.reader.model.config))
            cache.save(path, ids)
        return LolaCache.load(path, self.reader.model.config)[0]

    def found(self, question: Question, count: int) -> int:
        """The segment that a question finds after so many were read."""
        found = self.go_to(count).find(self.reader.encode(question.text))
        assert found is not None
        return found.document

    def recalled(self, question: Question, count: int) -> bool:
        """Whether what a question recalls after so many were read answers it."""
        recalled = self.go_to(count).recall(self.reader.encode(question.text))
        return self.answers(recalled.cache, question)

    def exact(self, question: Question, *caches: LolaCache) -> bool:
        """Whether one state answers a question, or several, composed in this order."""
        return self.answers(LolaCache.compose(caches, self.reader.model), question)  # one: a copy

    @torch.no_grad()
    def answers(self, cache: LolaCache, question: Question) -> bool:
        """Whether the likeliest tokens behind a question are the number. It is read in `cache`."""
        asked = self.reader.encode(question.text)
        answer = self.reader.encode(f" {question.answer}")
        out = self.reader.model(
            input_ids=torch.tensor([asked + answer[:-1]]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=len(answer),
        )
        return bool((out.logits[0].argmax(-1) == torch.tensor(answer)).all())

    def _path(self, kind: str, index: int) -> Path:
        return self.directory / f"{index}.{kind}.lola.safetensors"


def newest(args: argparse.Namespace, text: Text, question: Question) -> dict[str, Any]:
    """What a question gets that is asked where its segment ends."""
    at = question.segment
    present = text.kept(at)
    other = text.apart((at + args.questions // 2) % args.questions)
    row = {
        "apart": text.exact(question, text.apart(at)),
        "at once": text.exact(question, present),
        "beside another": text.exact(question, present, other),
    }
    return row | {
        "found": text.found(question, at + 1) == at,
        "recalled": text.recalled(question, at + 1),
    }  # fmt: skip


def later(args: argparse.Namespace, text: Text, question: Question, back: int) -> dict[str, Any]:
    """What a question gets so many tokens after the end of its segment."""
    at, until = question.segment, question.segment + back // args.tokens
    present, apart = text.kept(until), text.apart(at)
    row = {
        "present": text.exact(question, present),
        "present, apart": text.exact(question, present, apart),
        "apart, present": text.exact(question, apart, present),
        "present, kept": text.exact(question, present, text.kept(at)),
    }
    return row | {
        "found": text.found(question, until + 1) == at,
        "recalled": text.recalled(question, until + 1),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    torch.set_num_threads(1)
    args.dir.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("dir", "out", "back")}
    noted = args.dir / "settings.json"
    if noted.exists() and json.loads(noted.read_text()) != settings:
        raise SystemExit(f"--dir {args.dir}: it is of other settings; take an empty directory")
    noted.write_text(json.dumps(settings))
    reader = Reader(args.model)
    segments, questions = make(
        (ROOT / f"models/texts/{args.text}.txt").read_text(),
        reader.encode,
        segments=args.questions + max(args.back) // args.tokens,
        tokens=args.tokens,
        questions=args.questions,
        seed=args.seed,
    )
    text = Text(reader, segments, args.dir)
    text.read(args.questions)
    result = {"questions": float(len(questions))}
    result |= _answered(args, questions, "0", lambda question: newest(args, text, question))
    for back in sorted(args.back):
        text.read(args.questions + back // args.tokens)
        ask = partial(later, args, text, back=back)
        result |= _answered(args, questions, str(back), ask)
    for name, value in result.items():
        print(f"{name:40} {value:5.0f}")
    write_report(args, result)


def _answered(
    args: argparse.Namespace,
    questions: Sequence[Question],
    back: str,
    ask: Callable[[Question], dict[str, Any]],
) -> dict[str, float]:
    """How many questions were answered in each way; those that a file has are not asked again."""
    path = args.dir / f"{back}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with path.open("a") as file:
        for question in questions[len(rows) :]:
            rows.append(ask(question))
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            print(back, len(rows), rows[-1], flush=True)
    return {f"{name}, {back} back": float(sum(row[name] for row in rows)) for name in rows[0]}


if __name__ == "__main__":
    main()
