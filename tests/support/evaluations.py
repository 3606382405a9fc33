"""Evaluations of settings in this process, and the tiny models that they compare."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lola_vllm.evaluation import engine
from tests.support.families import make_base
from tools.support.speaking import make_speaking
from tools.support.tiny import VOCAB


class Child:
    """In place of an evaluation's process for a setting: its job runs in this one, where vLLM is
    imported. tests/engine/test_eval.py has the process."""

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
        engine._run(json.loads(self.job), lambda event: out.write(json.dumps(event) + "\n"))
        yield from io.StringIO(out.getvalue())

    def wait(self):
        return 0

    poll = wait


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let settings run in this process, one after the other."""
    monkeypatch.setattr(engine, "subprocess", SimpleNamespace(Popen=Child, PIPE=None))


def make_pair(lola: Path, base: Path) -> None:
    """A tiny LoLA model, and a softmax model of other weights with its tokenizer."""
    make_speaking(lola)
    make_base(base, "llama", vocab_size=VOCAB, head_dim=32)  # the least that vLLM has on CPUs
    for file in lola.glob("*token*"):
        shutil.copy(file, base)
