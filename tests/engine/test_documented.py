"""What the documentation does with vLLM in one process, on tiny models: programs, evaluations."""

import json
import shlex

import pytest

from lola_vllm.command import cli
from lola_vllm.training.texts import SEPARATOR
from tests.support.documented import ROOT, documented, programs
from tests.support.evaluations import in_this_process, make_pair
from tools.support.speaking import make_speaking


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


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    """What the tutorial has when it measures: a model, its base and texts."""
    place = tmp_path_factory.mktemp("tutorial")
    make_pair(place / "models/my-lola", place / "models/smollm2-base")
    words = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("algorithm", "bounds"))
    words = words.split("\n\n")
    (place / "models/texts").mkdir()
    (place / "models/texts/words.txt").write_text(SEPARATOR.join(words))
    return place


@pytest.mark.parametrize(("page", "command"), documented("engine"))
def test_evaluation(page, command, tutorial, monkeypatch):
    monkeypatch.chdir(tutorial)
    in_this_process(monkeypatch)
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
