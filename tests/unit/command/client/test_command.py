"""`lola-vllm sessions`: text in clear, and what is done to many sessions at once."""

from __future__ import annotations

import io
import time

import pytest

from lola_vllm.command import cli
from tests.support.standin import SESSIONS, standing_in

DAY = 86_400


@pytest.fixture
def script():
    with standing_in() as running:
        for name, days in {"new": 1, "old": 8, "kept": 9}.items():
            running.sessions[name] = 1, 10, "answer"
            running.used[name] = time.time() - days * DAY
        running.pinned.add("kept")
        yield running


@pytest.fixture
def run(script, capsys):
    def sessions(*words, status=0):
        assert cli.main(["sessions", *words, "--url", script.url]) == status
        return "".join(capsys.readouterr())

    return sessions


def test_old_sessions_are_deleted_and_pinned_ones_stay(script, run):
    assert "no session is that old" in run("rm", "--older-than", "10d", "--yes")
    assert run("rm", "--older-than", "180h", "--yes") == "old: 2 states deleted\n"
    assert script.deleted == ["old"]


def test_what_was_composed_of_a_session_is_named(script, run):
    script.composed["old"] = ["both", "more"]
    assert run("rm", "old") == (
        "old: 2 states deleted; what was composed of it stays: both, more\n"
    )


def test_all_are_deleted_after_a_yes(script, run, monkeypatch):
    class Keyboard(io.StringIO):
        def isatty(self):
            return True

    assert "give --yes" in run("rm", "--all", status=2)
    for answer in ("\n", "n\n", "never\n"):
        monkeypatch.setattr("sys.stdin", Keyboard(answer))
        said = run("rm", "--all", status=2)
        assert "delete 3 sessions, of which 1 pinned" in said and "nothing was deleted" in said
    assert script.deleted == []
    monkeypatch.setattr("sys.stdin", Keyboard("y\n"))
    run("rm", "--all")
    assert script.deleted == ["new", "old", "kept"]
    assert "there is no session" in run("rm", "--all", "--yes")


def test_one_that_is_written_just_now_is_named_and_the_others_are_deleted(script, run):
    script.refusals["DELETE", f"{SESSIONS}/old"] = 409, "'old' is being written"
    script.refusals["DELETE", f"{SESSIONS}/new"] = 404, "it has gone with another one"
    said = run("rm", "--all", "--yes", status=2)
    assert "1 of 3 sessions are not deleted; old: 'old' is being written" in said
    assert script.deleted == ["kept"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rm"], "name one session, or many"),
        (["rm", "old", "--all"], "name one session, or many"),
        (["rm", "old", "--older-than", "7d", "--yes"], "name one session, or many"),
        (["export", "old"], "name a session and a new file"),
        (["export", "old", "--all", "x"], "leave old out"),
    ],
)
def test_one_or_many_and_not_both(script, run, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in run(*words, status=2)
    assert script.deleted == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("age", ["7", "d", "7y", "-7d", "", "1e3d", "nan"])
def test_an_age_has_a_unit(run, age, capsys):
    with pytest.raises(SystemExit):
        run("rm", f"--older-than={age}", "--yes")
    assert "must be an age as 90s, 30m, 12h or 7d" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_are_exported(script, run, tmp_path, ranks):
    script.ranks = ranks
    script.refusals["GET", f"{SESSIONS}/old/state"] = 404, "not on the disk"
    run("export", "--all", str(tmp_path / "states"))
    parts = [""] if ranks == 1 else [".0of2", ".1of2"]
    found = {path.name: path.read_text() for path in (tmp_path / "states").iterdir()}
    assert found == {
        f"{name}{part}.lola.safetensors": f"{name} {rank}"
        for name in ("new", "kept")
        for rank, part in enumerate(parts)
    }
    script.refusals["GET", f"{SESSIONS}/old/state"] = 503, "it is being written"
    said = run("export", "--all", str(tmp_path / "states"), status=2)
    assert "1 of 3 sessions are not written; old: it is being written" in said


def test_what_nobody_named_has_no_file_to_export(script, run, tmp_path):
    words = "export", "--all", str(tmp_path / "states")
    for name, status in (("auto-1", 0), ("plan-b", 2)):  # a named one should have a file
        script.sessions[name] = 1, 10, "answer"
        script.used[name] = time.time()
        script.refusals["GET", f"{SESSIONS}/{name}/state"] = 503, f"{name} is in memory only"
        said = run(*words, status=status)
        assert "auto-1: passed over: without a name it is in memory only" in said
    assert "1 of 5 sessions are not written; plan-b" in said


def test_a_list_says_which_sessions_have_segments(script, run):
    script.segments["kept"] = 3
    rows = {line.split()[0]: line for line in run("list").splitlines()}
    assert rows["kept"].endswith("pinned +3 segments") and "segments" not in rows["new"]


@pytest.mark.parametrize("words", [["list"], ["rm", "--all", "--yes"], ["export", "--all", "x"]])
def test_a_server_that_lists_nobodys_sessions_says_so(script, run, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reason = "without an API key sessions are listed with --lola-list-sessions only"
    script.refusals["GET", SESSIONS] = 403, reason
    assert reason in run(*words, status=2)
    assert script.deleted == []
