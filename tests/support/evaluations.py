"""Evaluations in this process: tiny models, tokenizers that can be read, and what plans emit."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lola_vllm.evaluation import EvalError, engine
from lola_vllm.evaluation.plan import Plan
from lola_vllm.evaluation.results import Record, Row
from lola_vllm.evaluation.settings import Setting
from lola_vllm.training.texts import SEPARATOR, is_held_out
from tests.support.families import make_base
from tools.support.speaking import make_speaking
from tools.support.tiny import VOCAB


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let settings run in this process, where vLLM is imported; the names of those that ran.

    tests/engine/test_eval.py has the process that is theirs.
    """
    ran: list[str] = []

    def ask(plan: Plan, setting: Setting, *others: Any) -> Iterator[dict[str, Any]]:
        ran.append(setting.name)
        for event in engine.answers(plan, setting, *others):
            yield json.loads(json.dumps(event))

    monkeypatch.setattr(engine, "ask", ask)
    return ran


def make_pair(lola: Path, base: Path) -> None:
    """A tiny LoLA model, and a softmax model of other weights with its tokenizer."""
    make_speaking(lola)
    make_base(base, "llama", vocab_size=VOCAB, head_dim=32)  # the least that vLLM has on CPUs
    for file in lola.glob("*token*"):
        shutil.copy(file, base)


def rows_of(plan: Plan, model: Any, done: Any = ()) -> list[Row]:
    """The rows that a plan emits."""
    return [row for rows in plan.run(model, done) for row in rows]


def record_of(samples: list[Row], finished: bool = True) -> Record:
    """A record with these rows."""
    return Record(Setting("a", Path("a")), samples=samples, finished=finished)


def held_out(texts: Path, kind: str) -> list[str]:
    """The held-out documents of a file, each with the empty line after it."""
    documents = (texts / f"{kind}.txt").read_text(encoding="utf-8").split(SEPARATOR)
    return [f"{document.strip()}\n\n" for document in documents if is_held_out(document)]


class Letters:
    """A model whose tokens are letters; it says nothing.

    Attributes:
        prefix: opens a text.
    """

    special: frozenset[int] = frozenset()

    def __init__(self, prefix: str = "") -> None:
        self.tokenizer, self.prefix = self, prefix

    def encode(self, text: str, *, special: bool) -> list[int]:
        return [ord(c) for c in (self.prefix if special else "") + text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Words:
    """A tokenizer of words, digits and marks, and of `<end>`, with a special token at the front."""

    special: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.words: list[str] = []
        self.numbers: dict[str, int] = {}

    def encode(self, text: str, *, special: bool) -> list[int]:
        ids = []
        for word in re.findall(r"<end>|\s*(?:[A-Za-z]+|\d|[^\w\s]|_)|\s+", text):
            if word not in self.numbers:
                self.numbers[word] = len(self.words)
                self.words.append(word)
            ids.append(self.numbers[word])
        return [-1, *ids] if special else ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids if i >= 0)


class Finding:
    """A model that finds the number of a needle, in `left` questions: then it fails."""

    batch = 3

    def __init__(self, left: int = 10**6) -> None:
        self.tokenizer, self.left, self.asked = Words(), left, 0

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        self.left -= len(prompts)
        if self.left < 0:
            raise EvalError("out of order")
        self.asked += len(prompts)
        return [re.findall(r"is: (\w+)", self.tokenizer.decode(ids))[0] for ids in prompts]
