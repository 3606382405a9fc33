"""What the documentation does with vLLM in one process, on tiny models: programs, evaluations."""

import io
import json
import shlex
import shutil
from types import SimpleNamespace

import pytest

from lola_vllm.command import cli
from lola_vllm.evaluation import engine
from lola_vllm.training.texts import SEPARATOR
from tests.support.documented import ROOT, documented, programs
from tests.support.families import make_base
from tools.support.speaking import make_speaking
from tools.support.tiny import VOCAB


def test_program_answers(tmp_path, monkeypatch, capsys):
    page = "docs/howto/python.md"
    make_speaking(tmp_path / "models" / "smollm2-lola")
    monkeypatch.chdir(tmp_path)
    (program,) = [text for text in programs(ROOT / page) if "LLM(" in text]
    model = '"models/smollm2-lola",'
    program = program.replace(model, f"{model} max_model_len=1024, dtype='float32',")
    exec(compile(program, page, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    (told,) = [line for line in printed.splitlines() if line.startswith("{'session'")]
    # Whether tokens are restored depends on where a tokenizer parts the answer from the chat.
    assert "'session': 'physics', 'turn': 2" in told and "'restored_tokens'" in told


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


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    """What the tutorial has when it measures: a model, its base and texts."""
    place = tmp_path_factory.mktemp("tutorial")
    lola = make_speaking(place / "models/my-lola")
    base = place / "models/smollm2-base"
    make_base(base, "llama", vocab_size=VOCAB, head_dim=32)  # the least that vLLM has on CPUs
    for file in lola.glob("*token*"):
        shutil.copy(file, base)
    words = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("algorithm", "bounds"))
    words = words.split("\n\n")
    (place / "models/texts").mkdir()
    (place / "models/texts/words.txt").write_text(SEPARATOR.join(words))
    return place


@pytest.mark.parametrize(("page", "command"), documented("engine"))
def test_evaluation(page, command, tutorial, monkeypatch):
    monkeypatch.chdir(tutorial)
    monkeypatch.setattr(engine, "subprocess", SimpleNamespace(Popen=Child, PIPE=None))
    _, *words = shlex.split(command)
    fewer = ["--engine-args", '{"dtype": "float32"}']
    if words[1] == "recall":
        fewer += ["--lengths", "512", "--samples", "2"]
    else:
        fewer += ["--windows", "1", "--window-length", "256"]
    assert cli.main([*words, *fewer]) == 0
    out = tutorial / words[words.index("--out") + 1]
    settings = json.loads((out / f"{words[1]}.json").read_text())["settings"]
    assert [row["name"] for row in settings] == ["reference", "model"]
    assert all(len(row["samples"]) == (2 if words[1] == "recall" else 1) for row in settings)
    assert (out / f"{words[1]}.md").is_file()
