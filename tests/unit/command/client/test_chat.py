"""`lola-vllm chat`: how answers end, and what becomes of the conversation."""

import io

import pytest

import lola_vllm.command.client.chat as chat_module
from lola_vllm.command import cli
from lola_vllm.command.cli import INTERRUPTED
from tests.support.standin import SESSIONS

LIMIT_S = 60


@pytest.fixture
def say(script, capsys, monkeypatch):
    """Say lines in a chat named `talk`; status, and what was printed."""

    def chat(text, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        status = cli.main(["chat", script.url, "--session", "talk", *options])
        return status, *capsys.readouterr()

    return chat


def test_an_answer_has_a_length_unless_told_otherwise(script, say):
    script.answers = [(["a", "b"], "length"), (["a"], "stop"), (["a"], "length")]
    status, out, notes = say("x\ny\n")
    assert status == 0 and out == "ab\na\n"
    assert script.bodies[0]["max_tokens"] == 1024
    assert notes.count("cut at") == 1 and "[cut at 2 tokens: the server's --max-model-len" in notes
    assert "[cut at 1 tokens; --max-tokens N allows more]" in say("z\n", "--max-tokens", "1")[2]
    assert script.bodies[2]["max_tokens"] == 1


def test_an_answer_that_repeats_itself_is_ended_and_said_to_be(script, say):
    script.answers = [(["a"] * 4, "repetition"), (["b"], "stop")]
    status, _, notes = say("x\ny\n")
    assert status == 0 and "[ended at 4 tokens: the answer repeats itself]" in notes
    detection = script.bodies[0]["repetition_detection"]
    assert detection["min_count"] >= 3
    assert detection["min_pattern_size"] <= detection["max_pattern_size"] < 1024
    assert (script.bodies[1]["turn"], script.bodies[1]["tokens"]) == (1, 14)


def test_it_goes_on_where_the_sessions_of_others_are_not_listed(script, say):
    script.refusals["GET", SESSIONS] = 403, "start it with --lola-list-sessions"
    script.sessions["talk"] = 3, 30, "answer"
    script.answers = [(["a"], "stop")]
    status, _, notes = say("x\n")
    assert status == 0 and "talk: goes on after turn 3, 30 tokens" in notes
    assert (script.bodies[0]["turn"], script.bodies[0]["tokens"]) == (3, 30)


def test_an_answer_whose_connection_breaks_is_no_traceback(script, say):
    script.answers = [(["a"], "dies")]
    status, out, notes = say("x\n")
    assert status == 2 and out.strip() == "a"
    assert "the answer broke off (its end is missing)" in notes and "Traceback" not in notes


SOURCES = [
    {
        "document": "pump.md", "part": 2, "parts": 3, "share": 0.61, "tokens": 2000,
        "sentence": "It is blue.", "passage": "The pump runs. It is blue. So is its door.",
    },
    {
        "document": "oil.md", "part": 1, "parts": 1, "share": 0.2, "tokens": 90,
        "sentence": "Oil is not.", "passage": "Oil is not.",
    },
]  # fmt: skip


def test_each_message_is_asked_of_a_library(script, say):
    script.answers = [(["a"], "stop"), (["b"], "stop"), (["c"], "stop")]
    script.sources = SOURCES
    status, out, notes = say("x\ny\n", "--library", "manuals")
    assert status == 0 and out == "a\nb\n"
    first, second = script.bodies
    assert first["session"] == "talk" and "turn" not in first and "library" not in first
    assert (second["turn"], second["tokens"]) == (2, 51) and "session" not in second
    assert second["library"] == "manuals"
    assert notes.count("[[1] pump.md, part 2 of 3 (61%)]") == 2
    assert "[    The pump runs. It is blue. So is its door.]" in notes
    # What the second one read of the library is no part of the session.
    assert "turn 3: 51 tokens restored, 10 read" in notes
    assert say("z\n", "--library", "manuals")[0] == 0  # a session that has begun goes on
    assert script.bodies[2]["library"] == "manuals" and script.bodies[2]["turn"] == 3


def test_an_answer_of_a_library_is_ended_as_one_of_a_chat(script, capsys):
    script.answers, script.sources = [(["a"] * 4, "repetition")], SOURCES
    assert cli.main(["library", "ask", "manuals", "Which?", "--url", script.url]) == 0
    out, notes = capsys.readouterr()
    # The passages stand above the answer.
    assert out.index("[1] pump.md") < out.index("It is blue.") < out.index("aaaa")
    assert "[ended at 4 tokens: the answer repeats itself]" in notes
    assert script.bodies[0]["repetition_detection"]["min_count"] >= 3


def test_a_segment_that_comes_back_is_named_and_not_counted(script, say):
    script.sessions["talk"] = 3, 5000, "answer"
    script.answers = [(["a"], "stop"), (["b"], "stop"), (["c"], "stop")]
    script.recalled = {"first": 2000, "last": 4000, "score": 3.5, "sentence": "It is blue."}
    status, out, notes = say("x\n", "--recall")
    assert status == 0 and out == "a\n"
    assert script.bodies[0]["recall"] == "segments" and script.bodies[0]["turn"] == 3
    assert "[recalled tokens 2,000 to 3,999: It is blue.]" in notes
    assert "[turn 4: 5,000 tokens restored, 10 read" in notes
    script.recalled = None  # nothing comes back
    assert "recalled" not in say("y\n", "--recall")[2]
    say("z\n")
    assert "recall" not in script.bodies[2]


@pytest.mark.parametrize(("end", "turn"), [("unread", 1), ("hangs", 2)])
def test_a_librarys_answer_that_is_broken_off(script, capsys, monkeypatch, end, turn):
    script.answers = [(["a"], end), (["b"], "stop")]
    monkeypatch.setattr("lola_vllm.command.client.chat.SETTLE_S", 0.1)
    monkeypatch.setattr("sys.stdin", Keyboard("x\ny\n"))
    real = chat_module.Server.events

    def events(self, where, body):
        for number, event in enumerate(real(self, where, body)):
            yield event
            if len(script.bodies) == 1 and number == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(chat_module.Server, "events", events)
    assert cli.main(["chat", script.url, "--session", "talk", "--library", "manuals"]) == 0
    notes = capsys.readouterr().err
    assert ("that was broken off is not part of the memory" in notes) == (turn == 1)
    assert "session" not in script.bodies[1] and script.bodies[1]["turn"] == turn


class Keyboard(io.StringIO):
    def isatty(self):
        return True


class Screen(io.StringIO):
    """At the second word, somebody presses Ctrl-C."""

    def write(self, text):
        if text == "b":
            raise KeyboardInterrupt
        return super().write(text)


@pytest.mark.parametrize(
    ("end", "note", "place"),
    [
        ("hangs", "is part of the memory, and no answer: turn 4", (4, 40)),
        ("unread", "is not part of the memory", (3, 30)),
        ("kept", "is part of the memory, and all of the answer: turn 4", (4, 43)),
    ],
)
def test_what_is_left_of_an_answer_that_was_broken_off(script, say, monkeypatch, end, note, place):
    script.sessions["talk"] = 3, 30, "answer"
    script.answers = [(["a", "b", "c"], end), (["d"], "stop")]
    monkeypatch.setattr("sys.stdout", Screen())
    monkeypatch.setattr("io.StringIO", Keyboard)
    monkeypatch.setattr("lola_vllm.command.client.chat.SETTLE_S", 0.5)
    status, _, notes = say("x\ny\n")
    assert status == 0 and script.left.wait(LIMIT_S)
    assert "[broken off]" in notes and f"[the message that was broken off {note}" in notes
    assert (script.bodies[1]["turn"], script.bodies[1]["tokens"]) == place


def test_in_a_pipe_ctrl_c_ends_all(script, say, monkeypatch):
    script.answers = [(["a", "b"], "hangs"), (["d"], "stop")]
    monkeypatch.setattr("sys.stdout", Screen())
    assert say("x\ny\n")[0] == INTERRUPTED
    assert len(script.bodies) == 1
