"""Evaluations in this process: tiny models, tokenizers that can be read, and what plans emit."""

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lola_vllm.evaluation import engine
from lola_vllm.evaluation.plan import Plan
from lola_vllm.evaluation.results import Record, Row
from lola_vllm.evaluation.settings import Setting
from lola_vllm.training.texts import SEPARATOR, is_held_out
from tests.support.families import make_base
from tools.support.speaking import make_speaking
from tools.support.tiny import VOCAB


class Child:
    """In place of an evaluation's process for a setting: its job runs in this one, where vLLM is
    imported. tests/engine/test_eval.py has the process."""

    jobs: list[dict[str, Any]]

    def __init__(self, command, **_):
        assert command[1:] == ["-m", engine.__name__]
        self.stdin = self
        self.job = ""
        self.stdout = self.lines()

    def write(self, text):
        self.job += text

    def flush(self):
        pass

    close = flush

    def lines(self):
        out = io.StringIO()
        self.jobs.append(json.loads(self.job))
        engine._run(self.jobs[-1], lambda event: out.write(json.dumps(event) + "\n"))
        yield from io.StringIO(out.getvalue())

    def wait(self):
        return 0

    poll = wait


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let settings run in this process, one after the other; the jobs that they have."""
    monkeypatch.setattr(Child, "jobs", [], raising=False)
    monkeypatch.setattr(engine, "subprocess", SimpleNamespace(Popen=Child, PIPE=None))
    return Child.jobs


def make_pair(lola: Path, base: Path) -> None:
    """A tiny LoLA model, and a softmax model of other weights with its tokenizer."""
    make_speaking(lola)
    make_base(base, "llama", vocab_size=VOCAB, head_dim=32)  # the least that vLLM has on CPUs
    for file in lola.glob("*token*"):
        shutil.copy(file, base)


def rows_of(plan: Plan, model: Any, done: Any = ()) -> list[Row]:
    """The rows that a plan emits."""
    samples: list[Row] = []
    plan.run(model, lambda event: samples.extend(event["samples"]), done)
    return samples


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
    has_chat = True

    def __init__(self, prefix: str = "") -> None:
        self.tokenizer, self.prefix = self, prefix

    def encode(self, text: str, *, special: bool) -> list[int]:
        return [ord(c) for c in (self.prefix if special else "") + text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Words:
    """A tokenizer of words, digits and marks, and of `<end>`, with a special token at the front."""

    special: frozenset[int] = frozenset()
    has_chat = True

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

    def chat(self, message: str) -> list[int]:
        return self.encode(f"<user>{message}<model>", special=False)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids if i >= 0)
