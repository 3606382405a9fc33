"""How often a question finds its document among many, and what is answered from what was found.

    python benchmarks/library.py --documents 128 --seed 1 --text shakespeare_milton --dir /tmp/lib-1

Documents are passages of a text, each read once: `--dir` gets their keys, and the states of those
that are answered from. The same command goes on where it was interrupted. Each hides a number and a
fact in people's words, and there is a question about either. It is asked of shelves of several
sizes: of 8 documents, that which stands among the same 8, and so on. It is looked for by the
model's heads (`lola_vllm.memory.documents.choose`), by words (BM25), and by both, as a server does.

The first `--exact` of either kind are answered from what heads find among `--exact-of` documents:
the first, and the first three composed.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT, parser_of, print_values, write_report
from library_corpus import Corpus, Question, make
from question import queries_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_vllm.core.cpu import preferred_dtype
from lola_vllm.engine.hf import LolaCache
from lola_vllm.memory.documents.choose import CANDIDATES, choose
from lola_vllm.memory.documents.keys import DocumentKeys, Fetched
from lola_vllm.memory.documents.words import WordIndex, fuse

TOP = 3
ANSWER_TOKENS = {"needles": 9, "facts": 24}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--text", default="jane_austen", help="a file of models/texts")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2000, help="of each document")
    parser.add_argument("--shelves", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--questions", type=int, default=32, help="of each kind")
    parser.add_argument("--exact", type=int, default=0, help="of each kind")
    parser.add_argument("--exact-of", type=int, default=32, help="documents to choose from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, required=True, help="for states and keys")
    args = parser.parse_args()
    if not 0 < args.questions <= args.documents:
        parser.error(f"--questions {args.questions}: from 1 to --documents, {args.documents}")
    if args.exact > args.questions:
        parser.error(f"--exact {args.exact}: at most --questions, {args.questions}")
    args.shelves = [size for size in args.shelves if size <= args.documents]
    return args


class Reader:
    """A model and its tokenizer."""

    def __init__(self, model: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        # In the dtype in which this CPU is fast.
        dtype = preferred_dtype(json.loads((model / "config.json").read_text())) or "auto"
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    def encode(self, text: str) -> list[int]:
        """Token ids, without those that begin a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @torch.no_grad()
    def read(self, ids: list[int], cache: Any = None) -> tuple[Any, int]:
        """The cache after these tokens, and the likeliest next one."""
        out = self.model(
            input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return out.past_key_values, int(out.logits[0, -1].argmax())

    def answer(self, cache: Any, ids: list[int], most: int) -> str:
        """A greedy answer, to its end or of so many tokens."""
        cache, token = self.read(ids, cache)
        tokens: list[int] = []
        while token != self.tokenizer.eos_token_id and len(tokens) < most:
            tokens.append(token)
            cache, token = self.read([token], cache)
        text: str = self.tokenizer.decode(tokens)
        return text


class Shelf(Fetched[DocumentKeys]):
    """Documents that were read: their keys in files, and the states of the first `states`."""

    def __init__(self, reader: Reader, corpus: Corpus, directory: Path, states: int) -> None:
        self.reader, self.corpus, self.states = reader, corpus, states
        self.directory = directory
        # Files stay open, as those of a server do.
        opened = functools.cache(lambda index: DocumentKeys.read(directory / f"{index}.keys"))
        super().__init__(len(corpus.documents), opened)

    def state(self, index: int) -> LolaCache:
        """That of a document."""
        path, model = self.directory / f"{index}.lola.safetensors", self.reader.model
        if path.exists():
            return LolaCache.load(path, model.config)[0]
        ids = self.corpus.documents[index]
        cache: LolaCache = self.reader.read(ids, LolaCache(model.config))[0]
        if index < self.states:
            cache.save(path, ids)
        return cache

    def fill(self) -> None:
        """Read what is not there yet."""
        rope = self.reader.model.rope_table()
        for index, ids in enumerate(self.corpus.documents):
            keys = self.directory / f"{index}.keys"
            if not keys.exists():
                cache = self.state(index)
                row = cache.rows()[0]
                DocumentKeys.of_state(cache.sequence, row, len(ids), rope).write(keys)
                print(f"read {index + 1} of {len(self)}", flush=True)


class Asker:
    """Asks a shelf's questions, of those that stand beside the question's document."""

    def __init__(self, args: argparse.Namespace, shelf: Shelf) -> None:
        self.args, self.shelf = args, shelf
        self.texts = [shelf.reader.tokenizer.decode(ids) for ids in shelf.corpus.documents]
        self.words = functools.cache(lambda start, stop: WordIndex(self.texts[start:stop]))
        self.anchor = shelf.state(0)

    def row(self, question: Question) -> dict[str, Any]:
        """What became of a question."""
        reader, right = self.shelf.reader, question.document
        row: dict[str, Any] = {"kind": question.kind}
        ids = reader.encode(question.text)
        queries = queries_of(reader.model, self.anchor, ids)
        for size in self.args.shelves:
            start = right // size * size
            stop = min(start + size, len(self.shelf))
            group = Fetched(stop - start, lambda i, start=start: self.shelf[start + i])
            found = choose(queries, group, min(CANDIDATES, len(group)))
            heads = {choice.document: choice.score for choice in found}
            words = self.words(start, stop).find(question.words, CANDIDATES)
            orders = {"heads": list(heads), "words": list(words), "both": fuse([heads, words])}
            for by, order in orders.items():
                row[f"{by}, first of {size}"] = order[:1] == [right - start]
                row[f"{by}, among three of {size}"] = right - start in order[:TOP]
            if size == self.args.exact_of and right < self.args.exact:
                read = [start + i for i in orders["heads"][:TOP]]
                row |= self.answers(question, ids, read)
        return row

    def answers(self, question: Question, ids: list[int], order: Sequence[int]) -> dict[str, Any]:
        """Whether the answers from the first document and from all are exact, and what they say."""
        reader, found = self.shelf.reader, {}
        for count in dict.fromkeys((1, len(order))):
            caches = [self.shelf.state(i) for i in reversed(order[:count])]  # the best one last
            cache = caches[0] if count == 1 else LolaCache.compose(caches, reader.model)
            answer = reader.answer(cache, ids, ANSWER_TOKENS[question.kind])
            found[f"exact of {count}"] = question.answer.lower() in answer.lower()
            found[f"answer of {count}"] = answer
        return found


def main() -> None:
    """Measure and print."""
    args = parse()
    torch.set_num_threads(1)
    made_of = {name: str(getattr(args, name)) for name in ("model", "text", "tokens", "seed")}
    made_of["documents"] = str(args.documents)
    args.dir.mkdir(parents=True, exist_ok=True)
    noted = args.dir / "settings.json"
    if noted.exists() and json.loads(noted.read_text()) != made_of:
        raise SystemExit(f"--dir {args.dir}: it is of other settings; take an empty directory")
    noted.write_text(json.dumps(made_of))
    reader = Reader(args.model)
    text = (ROOT / f"models/texts/{args.text}.txt").read_text()
    corpus = make(text, reader.encode, documents=args.documents, tokens=args.tokens, seed=args.seed)
    shelf = Shelf(reader, corpus, args.dir, args.exact_of if args.exact else 1)
    shelf.fill()
    asker = Asker(args, shelf)
    counts: Counter[str] = Counter()
    for question in corpus.questions[: 2 * args.questions]:
        row = asker.row(question)
        print(json.dumps(row), flush=True)
        counts[f"{question.kind} questions"] += 1
        for name, value in row.items():
            if isinstance(value, bool):
                counts[f"{question.kind} {name}"] += value
    print_values(counts)
    write_report(args, dict(counts))


if __name__ == "__main__":
    main()
