"""`lola-vllm sessions` against a real server; `lola-vllm chat`: test_read_once.py."""

import json
import re

import pytest

from lola_vllm.command import cli
from tests.support.servers import KEY

TEXT = "the hidden state of the window is read by the model "


@pytest.fixture
def run(tiny, capsys, monkeypatch):
    """Run a verb of `lola-vllm sessions`; what it prints."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)

    def sessions(*words, status=0):
        assert cli.main(["sessions", *words, "--url", tiny.url]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return sessions


def append(server, name, text):
    answer = server.client.post(f"/v1/lola/sessions/{name}/append", json={"prompt": text})
    assert answer.status_code == 200, answer.text
    return answer.json()["tokens"]


def test_sessions_by_command(run, tiny, tmp_path):
    tokens = append(tiny, "cli", TEXT * 8)
    append(tiny, "cli", TEXT)
    head, first = run("list").splitlines()[:2]
    assert head.split()[:3] == ["session", "turn", "tokens"]
    assert re.fullmatch(r"cli +2 +[\d,]+ +[\d.]+ +\d+ s ago", first)
    assert json.loads(run("list", "--json"))[0]["session"] == "cli"
    assert len(run("show", "cli").splitlines()) == 3
    assert json.loads(run("show", "cli", "--json"))["turns"] == [1, 2]
    assert f"after {tokens:,} tokens of cli@1" in run("fork", "cli@1", "cli-b")
    file = tmp_path / "a state"
    for _ in range(50):  # until the server has written it
        if cli.main(["sessions", "export", "cli-b", str(file), "--url", tiny.url]) == 0:
            break
    assert file.stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["a state"]
    assert f"cli-c: {tokens:,} tokens" in run("import", str(file), "cli-c")
    assert "1 states deleted" in run("rm", "cli-c")
    assert "cli-c" not in run("list")
    assert run("show", "cli", "--text") == TEXT * 9 + "\n"


def test_what_is_wrong_is_said(run, tiny, tmp_path, monkeypatch):
    assert "nothing is stored under 'none'" in run("show", "none", status=2)
    assert "1 to 64" in run("rm", "../none", status=2)
    assert "1 to 64" in run("show", "cli@1", status=2)
    (tmp_path / "file").write_bytes(b"no state")
    assert "lola-vllm: error: " in run("import", str(tmp_path / "file"), "none", status=2)
    run("export", "none", str(tmp_path / "new"), status=2)
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    assert "VLLM_API_KEY" in run("list", status=2)
    assert cli.main(["sessions", "list", "--url", "http://127.0.0.1:9"]) == 2
    assert cli.main(["chat", "127.0.0.1:8000"]) == 2
