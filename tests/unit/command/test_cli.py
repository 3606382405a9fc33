"""The command line: exit statuses, messages and what is passed on."""

import json
import os
import subprocess
import sys

import pytest

from lola_vllm.command import cli
from lola_vllm.core.config import TensorFacts
from lola_vllm.models import read_facts
from tests.support.families import make_base


@pytest.fixture
def base(tmp_path):
    make_base(tmp_path / "base", "llama")
    return tmp_path / "base"


def test_init_writes_the_options_given(base, capsys):
    out = base.parent / "my lola"
    lola = {
        "window_size": 8, "sparse_cache_size": 0, "update_interval": 4, "sink_size": 2,
        "context_shift": 1024, "mixing": "lolcats", "sparse_sharing": "kv_head",
    }  # fmt: skip
    options = ["--state-heads", "query", "--lola-config", json.dumps(lola)]
    assert cli.main(["init", "--base", str(base), "--out", str(out), *options]) == 0
    assert json.loads((out / "config.json").read_text())["lola_config"] == lola
    assert read_facts(out) == TensorFacts(16, 4)
    first, last = capsys.readouterr().out.splitlines()
    assert str(out) in first and last == f"next: lola-vllm serve '{out}'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base", "nowhere"], "nowhere: no such directory"),
        (["--lola-config", '{"window_size": 0}'], "lola_config.window_size = 0"),
        (["--lola-config", '{"mixing": "both"}'], "'both': must be 'lola' or 'lolcats'"),
        (["--lola-config", '{"feature_dim": 8}'], "lola_config.feature_dim: unknown key"),
    ],
)
def test_user_errors_are_one_message_and_status_2(base, capsys, options, message):
    out = base.parent / "lola"
    assert cli.main(["init", "--base", str(base), "--out", str(out), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lola-vllm: error: ")
    assert message in captured.err
    assert captured.out == ""
    assert not out.exists()


@pytest.mark.parametrize("resumable", [False, True])
def test_ctrl_c_says_how_to_go_on(base, monkeypatch, capsys, resumable):
    def interrupted(*args: object, resume: bool = False, **kwargs: object) -> None:
        assert resume == resumable
        raise KeyboardInterrupt

    monkeypatch.setattr("lola_vllm.models.init.init_checkpoint", interrupted)
    monkeypatch.setattr("lola_vllm.training.distill.run.distill", interrupted)
    argv = ["--base", str(base), "--out", str(base.parent / "lola")]
    command = ["distill", "--data", "x", "--resume"] if resumable else ["init"]
    assert cli.main([*command, *argv]) == 130
    error = capsys.readouterr().err
    assert error.strip().startswith("lola-vllm: interrupted")
    assert ("go on with the same command and --resume" in error) == resumable


def test_a_closed_pipe_ends_it_quietly(base):
    code = (
        "import sys, lola_vllm.command.doctor as doctor\n"
        "doctor.examine = lambda model: [doctor.Finding('ok', 'x', 'y')] * 5000\n"
        "from lola_vllm.command.cli import main; sys.exit(main(['doctor']))"
    )
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, b"")


def test_module_and_help():
    command = [sys.executable, "-m", "lola_vllm"]
    result = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    for name in cli.COMMANDS:
        assert name in result.stdout
