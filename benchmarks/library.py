"""How often a question finds its document among many, and what is answered from what was found.

    python benchmarks/library.py --documents 32 --questions 32 --seed 1 --dir /tmp/library-32

Documents are passages of a text, each read once: `--dir` gets its state and its keys, and goes on
where it was left when the same command is run again. Questions are about something hidden in one of
them, a number or a fact in people's words (`--kind facts`). Each is asked

- of the document alone;
- of the three that `lola_vllm.library.choose` finds, composed;
- with `--in-a-row`, of these three, read in a row anew;
- with `--stock`, of a stock model that reads the three that BM25 finds (the package bm25s).

Questions of seed 0 chose between the scores; others report.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from common import ROOT, write_report
from library_corpus import Corpus, Question, make
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_vllm.hf import LolaCache
from lola_vllm.hf.question import queries_of
from lola_vllm.library.choose import NEUTRAL, ScoreName, choose
from lola_vllm.library.keys import DocumentKeys, reading_heads

SCORES: tuple[ScoreName, ...] = ("contrast", "share")
TOP = 3
ANSWER_TOKENS = {"needles": 9, "facts": 24}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--text", default="jane_austen", help="a file of models/texts")
    parser.add_argument("--kind", choices=tuple(ANSWER_TOKENS), default="needles")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2000, help="of each document")
    parser.add_argument("--questions", type=int, default=8, help="--documents or fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, required=True, help="for states, keys and answers")
    parser.add_argument(
        "--drop-states", action="store_true",
        help="keep keys alone, and read a chosen document again; its time is not counted",
    )  # fmt: skip
    parser.add_argument("--in-a-row", action="store_true")
    parser.add_argument("--stock", type=Path, help="a stock model, to read what BM25 finds")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.questions > args.documents:
        parser.error(f"--questions {args.questions}: at most one for each of --documents")
    return args


class Reader:
    """A model and its tokenizer."""

    def __init__(self, model: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()

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

    def ask(self, cache: Any, question: list[int], new: int) -> tuple[str, float]:
        """The answer, and the seconds to its first token."""
        began = time.perf_counter()
        cache, token = self.read(question, cache)
        first, tokens = time.perf_counter() - began, [token]
        while len(tokens) < new:
            cache, token = self.read(tokens[-1:], cache)
            tokens.append(token)
        return self.tokenizer.decode(tokens), first


class Shelf(Sequence[DocumentKeys]):
    """Documents that were read: their keys in files, and their states, unless these are dropped."""

    def __init__(self, reader: Reader, corpus: Corpus, directory: Path, drop: bool) -> None:
        self.reader, self.corpus, self.drop = reader, corpus, drop
        self.directory = directory
        self.rope = reader.model.model.rope_table()

    def __len__(self) -> int:
        return len(self.corpus.documents)

    @overload
    def __getitem__(self, index: int) -> DocumentKeys: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[DocumentKeys]: ...
    def __getitem__(self, index: int | slice) -> DocumentKeys | Sequence[DocumentKeys]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return DocumentKeys.read(self.directory / f"{index}.keys")

    def state(self, index: int) -> LolaCache:
        """That of a document."""
        path = self.directory / f"{index}.lola.safetensors"
        if path.exists():
            return LolaCache.load(path, self.reader.model.config)[0]
        cache: LolaCache = self.reader.read(
            self.corpus.documents[index], LolaCache(self.reader.model.config)
        )[0]
        return cache

    def fill(self) -> list[float]:
        """Read what is not there yet; the seconds of each."""
        seconds = []
        for index, ids in enumerate(self.corpus.documents):
            keys = self.directory / f"{index}.keys"
            if keys.exists():
                continue
            began = time.perf_counter()
            cache = self.state(index)
            seconds.append(time.perf_counter() - began)
            if not self.drop:
                cache.save(self.directory / f"{index}.lola.safetensors", ids)
            row = cache.rows()[0]
            DocumentKeys.of_state(cache.sequence, row, len(ids), self.rope).write(keys)
            print(f"read {index + 1} of {len(self)}", flush=True)
        return seconds

    def nbytes(self, pattern: str) -> int:
        """Bytes of files."""
        return sum(path.stat().st_size for path in self.directory.glob(pattern))


class Search:
    """BM25 over the texts, and a stock model that reads what it finds."""

    def __init__(self, model: Path, texts: list[str]) -> None:
        import bm25s  # type: ignore[import-not-found,unused-ignore]

        self._bm25s, self.texts, self.reader = bm25s, texts, Reader(model)
        self._index = bm25s.BM25()
        self._index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False))

    def find(self, question: str) -> list[int]:
        """The documents of largest score, the best first."""
        words = self._bm25s.tokenize(question, stopwords="en", show_progress=False)
        found, _ = self._index.retrieve(words, k=min(TOP, len(self.texts)), show_progress=False)
        return [int(index) for index in found[0]]

    def ask(self, best: list[int], question: str, new: int) -> tuple[str, float]:
        """The answer to texts, the best last, and the seconds to its first token."""
        text = "\n\n".join(self.texts[i] for i in reversed(best)) + question
        return self.reader.ask(None, self.reader.encode(text), new)


def rows_of(
    args: argparse.Namespace, shelf: Shelf, search: Search | None, done: int
) -> Iterator[dict[str, Any]]:
    """What became of each question that was not asked yet."""
    reader, questions = shelf.reader, shelf.corpus.questions
    anchor = shelf.state(0)
    neutral = queries_of(reader.model, anchor, reader.encode(NEUTRAL))
    for question in questions[done:]:
        yield _asked(args, shelf, search, question, anchor, neutral)


def _asked(
    args: argparse.Namespace,
    shelf: Shelf,
    search: Search | None,
    question: Question,
    anchor: LolaCache,
    neutral: list[torch.Tensor],
) -> dict[str, Any]:
    reader, right, new = shelf.reader, question.document, ANSWER_TOKENS[args.kind]
    ids, row, seconds = reader.encode(question.text), dict[str, Any](), dict[str, float]()

    def answered(name: str, answer: str, first: float) -> None:
        row[f"answer {name}"] = answer
        row[f"exact {name}"] = question.answer.lower() in answer.lower()
        seconds[f"first token {name}"] = first

    began = time.perf_counter()
    queries = queries_of(reader.model, anchor, ids)
    found = {score: choose(queries, neutral, shelf, TOP, score) for score in SCORES}
    seconds["choose"] = (time.perf_counter() - began) / len(SCORES)
    for score, choices in found.items():
        order = [choice.document for choice in choices]
        row |= {f"{score} first": order[0] == right, f"{score} among three": right in order}
    answered("alone", *reader.ask(shelf.state(right), ids, new))
    best = [choice.document for choice in found["contrast"]][::-1]  # the best one last
    began = time.perf_counter()
    caches = [shelf.state(i) for i in best]
    seconds["load"] = 0.0 if shelf.drop else time.perf_counter() - began
    began = time.perf_counter()
    composed = LolaCache.compose(caches, reader.model)
    seconds["compose"] = time.perf_counter() - began
    answer, first = reader.ask(copy.deepcopy(composed), ids, new)
    before = seconds["choose"] + seconds["load"] + seconds["compose"]
    answered("composed", answer, before + first)
    if args.in_a_row:
        began = time.perf_counter()
        texts = [token for i in best for token in shelf.corpus.documents[i]]
        cache, _ = reader.read(texts, LolaCache(reader.model.config))
        took = time.perf_counter() - began
        answer, first = reader.ask(cache, ids, new)
        answered("in a row", answer, took + first)
    if search is not None:
        began = time.perf_counter()
        order = search.find(question.text)
        took = time.perf_counter() - began
        row |= {"bm25 first": order[0] == right, "bm25 among three": right in order}
        answer, first = search.ask(order, question.text, new)
        answered("bm25 and stock", answer, took + first)
    return row | {"seconds": seconds}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    settings = {
        name: str(value)
        for name, value in vars(args).items()
        if name not in ("dir", "out", "questions")
    }
    args.dir.mkdir(parents=True, exist_ok=True)
    noted, answers = args.dir / "settings.json", args.dir / "answers.jsonl"
    if noted.exists() and json.loads(noted.read_text()) != settings:
        raise SystemExit(f"--dir {args.dir}: it is of other settings; take an empty directory")
    noted.write_text(json.dumps(settings))
    reader = Reader(args.model)
    text = (ROOT / f"models/texts/{args.text}.txt").read_text()
    corpus = make(
        text, reader.encode, documents=args.documents, tokens=args.tokens,
        questions=args.questions, kind=args.kind, seed=args.seed,
    )  # fmt: skip
    shelf = Shelf(reader, corpus, args.dir, args.drop_states)
    reading = shelf.fill()
    texts = [reader.tokenizer.decode(ids) for ids in corpus.documents]
    search = Search(args.stock, texts) if args.stock else None
    lines = answers.read_text().splitlines() if answers.exists() else []
    rows = [json.loads(line) for line in lines][: args.questions]
    with answers.open("a") as file:
        for row in rows_of(args, shelf, search, len(rows)):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(len(rows), {k: v for k, v in row.items() if k != "seconds"}, flush=True)
    result = summed(rows)
    if reading:
        result["read one s"] = sum(reading) / len(reading)
    result |= {
        "heads": len(reading_heads(shelf.state(0).sequence)),
        "key MiB": shelf.nbytes("*.keys") / len(shelf) / 2**20,
        "state MiB": shelf.nbytes("*.lola.safetensors") / len(shelf) / 2**20,
        "text MiB": sum(len(text.encode()) for text in texts) / len(texts) / 2**20,
    }
    for name, value in result.items():
        print(f"{name:32} {value:10.3f}")
    write_report(args, result)


def summed(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many questions had each property, and the mean seconds."""
    result: dict[str, float] = defaultdict(float)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, bool):
                result[name] += value
        for name, value in row["seconds"].items():
            result[f"{name} s"] += value / len(rows)
    return {"questions": len(rows), **result}


if __name__ == "__main__":
    main()
