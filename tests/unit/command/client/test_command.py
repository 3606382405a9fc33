"""`lola-vllm sessions`: text in clear, and what is done to many sessions at once."""

import io
import time

import pytest

from lola_vllm.command import cli
from tests.support.standin import SESSIONS

DAY = 86_400


@pytest.fixture
def script(script):
    for name, days in {"new": 1, "old": 8, "kept": 9}.items():
        script.sessions[name] = 1, 10, "answer"
        script.used[name] = time.time() - days * DAY
    return script


@pytest.fixture
def run(script, capsys):
    def sessions(*words, status=0):
        assert cli.main(["sessions", *words, "--url", script.url]) == status
        return "".join(capsys.readouterr())

    return sessions


def test_old_sessions_are_deleted(script, run):
    assert "no session is that old" in run("rm", "--older-than", "10d", "--yes")
    assert run("rm", "--older-than", "200h", "--yes") == "kept: 2 states deleted\n"
    assert script.deleted == ["kept"]


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
        assert "delete 3 sessions of" in said and "nothing was deleted" in said
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


@pytest.mark.parametrize("words", ["rm", "rm old --all", "rm old --older-than 7d --yes"])
def test_one_or_many_and_not_both(script, run, words):
    assert "name one session, or many" in run(*words.split(), status=2)
    assert script.deleted == []


@pytest.mark.parametrize("age", ["7", "d", "7y", "-7d", "", "1e3d", "nan"])
def test_an_age_has_a_unit(run, age, capsys):
    with pytest.raises(SystemExit):
        run("rm", f"--older-than={age}", "--yes")
    assert "must be an age as 90s, 30m, 12h or 7d" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_has_a_file(script, run, tmp_path, ranks):
    script.ranks = ranks
    run("export", "new", str(tmp_path / "x"))
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"x": "new 0", "x.1": "new 1"} if ranks == 2 else {"x": "new 0"}
    script.refusals["GET", f"{SESSIONS}/old/state"] = 503, "it is being written"
    assert "it is being written" in run("export", "old", str(tmp_path / "y"), status=2)


def test_a_list_says_which_sessions_have_segments(script, run):
    script.segments["kept"] = 3
    rows = {line.split()[0]: line for line in run("list").splitlines()}
    assert rows["kept"].endswith("+3 segments") and "segments" not in rows["new"]


@pytest.mark.parametrize("words", [["list"], ["rm", "--all", "--yes"]])
def test_a_server_that_lists_nobodys_sessions_says_so(script, run, words):
    reason = "without an API key sessions are listed with --lola-list-sessions only"
    script.refusals["GET", SESSIONS] = 403, reason
    assert reason in run(*words, status=2)
    assert script.deleted == []
