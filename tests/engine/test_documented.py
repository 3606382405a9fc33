"""Evaluations of the documentation with vLLM in one process, on tiny models.

The program of docs/howto/python.md: tests/engine/test_smollm2.py.
"""

import json
import shlex

import pytest

from lola_vllm.command import cli
from lola_vllm.training.texts import SEPARATOR
from tests.support.documented import ROOT, documented
from tests.support.engine import not_compiled, replace_kernels_once
from tests.support.evaluations import in_this_process, make_pair


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
    replace_kernels_once()
    _, *words = shlex.split(command)
    fewer = ["--engine-args", '{"dtype": "float32"}']
    if words[1] == "recall":
        fewer += ["--lengths", "512", "--samples", "2"]
    else:
        fewer += ["--windows", "1", "--window-length", "256"]
    with not_compiled():
        assert cli.main([*words, *fewer]) == 0
    out = tutorial / words[words.index("--out") + 1]
    settings = json.loads((out / f"{words[1]}.json").read_text())["settings"]
    assert [row["name"] for row in settings] == ["reference", "model"]
    assert all(len(row["samples"]) == (2 if words[1] == "recall" else 1) for row in settings)
    assert (out / f"{words[1]}.md").is_file()
