"""What a text's own past answers where newer text tells the same thing anew, or something like it.

    python benchmarks/past_newer.py --seed 4 --text debian_handbook

One text is read in six segments of `--tokens` tokens. Each has a number in a sentence, and a fact
as users tell it in conversations. For each of these, 800 tokens more are read, which tell either
the same thing with another answer, or another thing in the same words. Then one is
asked for:

- `update`: what was told anew: the newer answer is right;
- `present`: the other thing, which only the newest text tells;
- `past`: after that other thing, what the segment tells.

Each is asked of the text alone (`alone`), of the segment that it finds behind the text (`behind`)
and before it (`before`), as `lola_vllm.engine.hf.past` does it (`recalled`), and of `past` of the
segment alone (`apart`). Seeds 0, 3, 10 and above chose the rule; others report.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROOT, write_report
from library import Reader
from library_corpus import DEVELOPMENT_NEEDLES, NEEDLE, WORDS, development

from lola_vllm.engine.hf import LolaCache
from lola_vllm.engine.hf.past import Past
from lola_vllm.evaluation.chat_facts import CHAT_TASKS, Form

SEGMENTS = 6
REST = 800  # tokens
ANSWER_TOKENS = 10


class Told(NamedTuple):
    """A sentence, the question about it, and what a right answer has in it."""

    sentence: str
    question: str
    answer: str


class Teller:
    """What is told, in the order of a seed's chance."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed + 500)
        self.needle = DEVELOPMENT_NEEDLES[seed % 3] if development(seed) else NEEDLE
        self.subjects = [f"{a}-{b}" for a in WORDS for b in WORDS]
        self.chance.shuffle(self.subjects)
        self.forms: list[Form] = [
            form for task in ("chat-fact", "chat-name") for form in CHAT_TASKS[task].forms
        ]
        self.chance.shuffle(self.forms)
        self.told = [
            (i, of, self.number(i) if of == "number" else self.fact(i))
            for i in range(SEGMENTS)
            for of in ("number", "fact")
        ]

    def number(self, subject: int) -> Told:
        number = str(self.chance.randrange(10**6, 10**7))
        said, asked = (x.format(key=self.subjects[subject], number=number) for x in self.needle)
        return Told(said, asked, number)

    def fact(self, form: int) -> Told:
        fact = self.forms[form % len(self.forms)](self.chance)
        asked = f"\nQuestion: {fact.question}\nAnswer: {fact.begun}"
        return Told(f" {fact.sentence}", asked, fact.answer)

    def newer(self, segment: int, of: str, old: Told, anew: bool) -> Told:
        """The same thing with another answer, or another in the same words."""
        if of == "number":
            return self.number(segment if anew else SEGMENTS + segment)
        while True:
            found = self.fact(segment)
            if (found.question == old.question) == anew and found.answer != old.answer:
                return found


class Text:
    """The six segments, read, and how the text goes on."""

    def __init__(self, args: argparse.Namespace, reader: Reader, teller: Teller) -> None:
        self.reader, self.teller = reader, teller
        text = (ROOT / f"models/texts/{args.text}.txt").read_text()
        start = teller.chance.randrange(len(text) // 2)
        ids = reader.encode(text[start : start + 8 * (SEGMENTS + 4) * args.tokens])
        if len(ids) < SEGMENTS * args.tokens + REST:
            raise SystemExit(f"the text has {len(ids)} tokens behind its start; take a longer one")
        self.past, at = Past(reader.model, args.tokens), 0
        for segment in range(SEGMENTS):
            hidden = [
                (int(teller.chance.random() * (args.tokens - 200)), reader.encode(told.sentence))
                for i, _, told in teller.told
                if i == segment
            ]
            body = ids[at : at + args.tokens - sum(len(x) for _, x in hidden)]
            at += len(body)
            for place, said in sorted(hidden, reverse=True):
                body = body[:place] + said + body[place:]
            self.past.read(body)
        self.rest, self.whole = ids[at : at + REST], self.past.cache

    def go_on(self, told: Told) -> None:
        """From the end of the segments, with something told."""
        past = self.past
        past.cache, past.tokens = copy.deepcopy(self.whole), past.tokens[: self._end]
        del past.keys[SEGMENTS:]
        said = self.reader.encode(told.sentence)
        body = self.rest[: REST - len(said)]
        place = int(self.teller.chance.random() * len(body))
        past.read(body[:place] + said + body[place:])

    def ask(self, told: Told, kind: str) -> dict[str, bool]:
        """Whether the answer is right, by what it is asked of."""
        asked, past = self.reader.encode(told.question), self.past
        found = past.find(asked)
        assert found is not None
        first = found.document * past.segment_tokens
        apart = LolaCache(self.reader.model.config)
        self.reader.read(past.tokens[first : first + past.segment_tokens], apart)
        orders = {"behind": [past.cache, apart], "before": [apart, past.cache]}
        caches = {how: LolaCache.compose(x, self.reader.model) for how, x in orders.items()}
        caches |= {"alone": copy.deepcopy(past.cache), "recalled": past.recall(asked).cache}
        if kind == "past":
            caches["apart"] = apart
        return {how: told.answer in self._answer(cache, asked) for how, cache in caches.items()}

    @torch.no_grad()
    def _answer(self, cache: LolaCache, asked: list[int]) -> str:
        tokens, said = asked, list[int]()
        while len(said) < ANSWER_TOKENS:
            ids = torch.tensor([tokens])
            out = self.reader.model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            tokens = [int(out.logits[0, -1].argmax())]
            said += tokens
        text: str = self.reader.tokenizer.decode(said)
        return text

    @property
    def _end(self) -> int:
        return SEGMENTS * self.past.segment_tokens


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of each question, what it is about and whether it was answered."""
    reader, teller = Reader(args.model), Teller(args.seed)
    text = Text(args, reader, teller)
    for number, (segment, of, old) in enumerate(teller.told):
        anew = bool(number // 2 % 2)
        newer = teller.newer(segment, of, old, anew)
        text.go_on(newer)
        about = {"kind": "update" if anew else "present", "of": of}
        yield about | text.ask(newer, about["kind"])
        if not anew:
            yield {"kind": "past", "of": of} | text.ask(old, "past")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--text", default="jane_austen", help="a file of models/texts")
    parser.add_argument("--tokens", type=int, default=2000, help="of a segment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    counts = Counter[str]()
    for row in rows(args):
        kind, of = row.pop("kind"), row.pop("of")
        print(kind, of, row, flush=True)
        counts[f"{kind}, {of}"] += 1
        for how, right in row.items():
            counts[f"{kind}, {of}, {how}"] += right
    result = {name: float(count) for name, count in sorted(counts.items())}
    print(json.dumps(result, indent=1))
    write_report(args, result)


if __name__ == "__main__":
    main()
