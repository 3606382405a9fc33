"""How well a library of manual pages answers people's questions.

    python benchmarks/library_pages.py --dir /tmp/pages

The documents are manual pages and HTML of Debian packages, which apt downloads, and groff makes the
pages' text as `man` does. `library_questions.json` names them, and has the questions: their
document, the sentence that has the answer, and what a right answer says. Those with `"use":
"choose"` chose how documents are found and asked, and the others report.

Counted are the right document, first and among three, by the model's heads, by words, and by both;
the right sentence; and the right answer of

- the first document's state, with and without the passages of three before the question;
- three states composed, with the passages;
- with `--base`, a stock model that reads the document that BM25 finds.

`--dir` gets pages, states and keys, and is gone on with.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROOT, parser_of, print_values, write_report
from library import Reader, Shelf
from library_corpus import Corpus
from question import queries_of

from lola_vllm.command.client.documents import read_file
from lola_vllm.engine.hf import LolaCache
from lola_vllm.memory.documents.choose import CANDIDATES, FOUND, Choice, choose
from lola_vllm.memory.documents.parts import PART_TOKENS, split_text
from lola_vllm.memory.documents.passage import Passage, before_question, passage_of
from lola_vllm.memory.documents.words import WordIndex, fuse

QUESTIONS = Path(__file__).with_name("library_questions.json")
ANSWER_TOKENS = 32
ASKED_OF = ("first", "first and passages", "three and passages", "base")


class Part(NamedTuple):
    """A part of a document: its title, its text, and its tokens."""

    document: str
    text: str
    tokens: list[int]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models/qwen-lola")
    parser.add_argument("--base", type=Path, help="a stock model, to read what BM25 finds")
    parser.add_argument("--dir", type=Path, required=True, help="for pages, states and keys")
    parser.add_argument("--use", choices=("choose", "report"), default="report")
    parser.add_argument("--ask", nargs="*", default=list(ASKED_OF[:3]), choices=ASKED_OF)
    args = parser.parse_args()
    if "base" in args.ask and args.base is None:
        parser.error("--ask base: give the model as --base DIR")
    return args


def fetch(directory: Path, packages: list[str], documents: dict[str, str]) -> dict[str, str]:
    """The text of each document, by its title.

    Args:
        packages: of Debian, which are downloaded and unpacked, not installed. documents: the path
            of each in the packages.
    """
    directory.mkdir(parents=True, exist_ok=True)
    root = directory / "root"
    if not root.exists():
        subprocess.run(["apt-get", "download", *packages], cwd=directory, check=True)
        for package in directory.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, root], check=True)
    texts = {}
    for title, path in documents.items():
        file = root / path
        if file.suffix == ".gz":  # a manual page, as `man` prints it
            page = gzip.decompress(file.read_bytes())
            command = ["groff", "-mandoc", "-t", "-Tutf8", "-P-c"]
            printed = subprocess.run(command, input=page, capture_output=True, check=True).stdout
            file = directory / f"{title}.txt"
            file.write_bytes(printed)
        texts[title] = read_file(file)
    return texts


def right(answer: str, answers: list[str]) -> bool:
    """Whether an answer says one of these, as words of their own."""
    said = answer.lower()
    return any(re.search(rf"(?<!\w){re.escape(one.lower())}(?!\w)", said) for one in answers)


class Asker:
    """A model that is asked a library's questions."""

    def __init__(self, reader: Reader, parts: list[Part], shelf: Shelf) -> None:
        self.reader, self.parts, self.shelf = reader, parts, shelf
        self.words = WordIndex([part.text for part in parts])
        self.anchor = shelf.state(min(range(len(parts)), key=lambda i: len(parts[i].tokens)))

    def orders(self, question: str) -> tuple[dict[str, list[int]], dict[int, Choice]]:
        """The parts as heads, words and both find them, and what the heads read."""
        ids = self.reader.encode(f"\n{question}")
        queries = queries_of(self.reader.model, self.anchor, ids)
        found = choose(queries, self.shelf, min(CANDIDATES, len(self.shelf)))
        heads = {choice.document: choice.score for choice in found}
        words = self.words.find(question, CANDIDATES)
        orders = {"heads": list(heads), "words": list(words), "both": fuse([heads, words])}
        return orders, {choice.document: choice for choice in found}

    def passage(self, part: int, choice: Choice | None, question: str) -> Passage:
        """What is shown of a part."""
        decode, tokens = self.reader.tokenizer.decode, self.parts[part].tokens
        read = [len(decode(tokens[:peak])) for peak in (choice.peaks if choice else ())]
        return passage_of(decode(tokens), read, question)


def prompt(reader: Reader, question: str, before: str, after: bool) -> list[int]:
    """The tokens of a message, with a text before the question.

    Args:
        after: whether it follows a document, and so nothing of a system's.
    """
    content = f"{before}\n\n{question}" if before else question
    messages = [{"role": "user", "content": content}]
    text: str = reader.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return reader.encode("\n" + text[text.index("<|im_start|>user") :] if after else text)


def row_of(
    args: argparse.Namespace, asker: Asker, base: Reader | None, one: dict[str, Any]
) -> dict[str, Any]:
    """What became of a question."""
    question, row = one["question"], {}
    orders, read = asker.orders(question)
    for by, order in orders.items():
        titles = [asker.parts[i].document for i in order[:FOUND]]
        row[f"{by}, first"] = titles[:1] == [one["document"]]
        row[f"{by}, among three"] = one["document"] in titles
    order = orders["both"][:FOUND]
    passages = [asker.passage(i, read.get(i), question) for i in order]
    row["sentence"] = one["sentence"] in passages[0].sentence
    row["passages of three"] = any(one["sentence"] in passage.text for passage in passages)
    said = [(asker.parts[i].document, p.text) for i, p in zip(order, passages, strict=True)]
    before, said_by = before_question(said), {}
    for of in args.ask:
        if base is not None and of == "base":
            best = asker.parts[(orders["words"] or [0])[0]]
            said_by[of] = base.answer(None, prompt(base, question, best.text, False), ANSWER_TOKENS)
            continue
        states = [asker.shelf.state(i) for i in reversed(order[: 3 if "three" in of else 1])]
        model = asker.reader.model
        cache = states[0] if len(states) == 1 else LolaCache.compose(states, model)
        ids = prompt(asker.reader, question, before if "passages" in of else "", True)
        said_by[of] = asker.reader.answer(cache, ids, ANSWER_TOKENS)
    row |= {f"answer, {of}": right(text, one["answers"]) for of, text in said_by.items()}
    return row | {"question": question, "shown": passages[0].sentence, "said": said_by}


def main() -> None:
    """Measure and print."""
    args = parse()
    torch.set_num_threads(1)
    reader = Reader(args.model)
    base = Reader(args.base) if args.base else None
    asked = json.loads(QUESTIONS.read_text())
    parts = [
        Part(title, text, list(reader.tokenizer.encode(text)))
        for title, whole in fetch(args.dir / "pages", asked["packages"], asked["documents"]).items()
        for text in split_text(whole, PART_TOKENS, lambda text: len(reader.encode(text)))
    ]
    shelf = Shelf(reader, Corpus([part.tokens for part in parts], []), args.dir, len(parts))
    shelf.fill()
    asker = Asker(reader, parts, shelf)
    results: dict[str, float] = {"parts": len(parts), "documents": len(asked["documents"])}
    for one in asked["questions"]:
        if one["use"] != args.use:
            continue
        row = row_of(args, asker, base, one)
        print(json.dumps(row), flush=True)
        results["questions"] = results.get("questions", 0) + 1
        for name, value in row.items():
            if isinstance(value, bool):
                results[name] = results.get(name, 0) + value
    print_values(results)
    write_report(args, results)


if __name__ == "__main__":
    main()
