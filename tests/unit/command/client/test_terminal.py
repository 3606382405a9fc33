"""Texts of others are printed without the characters that act in a terminal."""

import io
from pathlib import Path

import pytest

import lola_vllm.command.client
from lola_vllm.command import cli
from lola_vllm.command.client import ClientError
from lola_vllm.command.client.terminal import harmless, print

# Sets the title, clears the screen, goes to the line's begin, rings, turns the direction; C1's CSI.
ACTING = "\x1b]0;title\x07 \x1b[2J \r \x08 \x00 \x7f \x9b31m \u202e \u2066"


def acts(text: str) -> bool:
    return any(c in text for c in "\x1b\x07\r\x08\x00\x7f\x9b\u202e\u2066")


def test_what_acts_is_left_out_and_all_else_stays():
    assert not acts(harmless(ACTING))
    text = "Line\tof\nwörds, 字, עברית \u200f and 😀\u200d🚀"
    assert harmless(text) == text
    assert not acts(str(ClientError(f"the server says {ACTING}")))


def test_an_answer_a_source_and_a_refusal_do_not_act(script, capsys, monkeypatch):
    """Also where an escape sequence comes in two pieces."""
    script.answers = [(["be", "fore\x1b", "[2J", ACTING, "after"], "stop")] * 2
    script.sources = [
        {"document": f"a{ACTING}b", "part": 1, "parts": 1, "share": 1.0, "tokens": 9,
         "sentence": f"It{ACTING} is.", "passage": f"It{ACTING} is."}
    ]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    for words in (
        ["chat", script.url, "--session", "one"],
        ["library", "ask", "shelf", "x", "--url", script.url],
    ):
        assert cli.main(words) == 0
        out, notes = capsys.readouterr()
        assert "before[2J" in out and not acts(out), out
        assert not acts(notes), notes
    assert " is." in out
    script.sessions["talk"], script.texts["talk"] = (1, 9, "answer"), f"user: {ACTING}"
    assert cli.main(["sessions", "show", "talk", "--text", "--url", script.url]) == 0
    out = capsys.readouterr().out
    assert "user: " in out and not acts(out)
    script.refusals["DELETE", "/v1/lola/sessions/talk"] = 409, f"it is {ACTING} busy"
    assert cli.main(["sessions", "rm", "talk", "--url", script.url]) == 2
    error = capsys.readouterr().err
    assert "busy" in error and not acts(error)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "stream, begin, end",
    [(_Terminal(), "\r\033[K\033[2m", "\033[0m\n"), (io.StringIO(), "", "\n")],
)
def test_the_clients_own_codes_are_for_a_terminal(stream, begin, end):
    print("a\x1b[1mb", "c", file=stream, over=True, dim=True)
    assert stream.getvalue() == f"{begin}a[1mb c{end}"


def test_all_modules_of_the_client_print_so():
    folder = Path(lola_vllm.command.client.__file__).parent
    printing = [path for path in folder.glob("*.py") if " print(" in path.read_text()]
    assert len(printing) >= 3
    for path in printing:
        text = path.read_text()
        assert path.name == "terminal.py" or "terminal import" in text, path.name
