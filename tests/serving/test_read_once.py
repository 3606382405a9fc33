"""The demonstration of the README, with a tiny model, a short file and a server that is there.

That a server finds its states after a restart is asked in tests/reliability/test_storm.py.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tools import read_once
from tools.support.server_process import Server

QUESTIONS = ["What is the code of the vault?", "Say it again.", "What is the code of the vault?"]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_a_file_is_read_once(keyless, tmp_path, monkeypatch, capsys):
    started = []

    @contextmanager
    def serving(log: Path, command: Sequence[str]) -> Iterator[Server]:
        started.append(command)
        yield keyless

    monkeypatch.setattr(read_once, "serving", serving)
    file = tmp_path / "note.txt"
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    file.write_text(noise * 12 + "The code of the vault is 73192. " + noise * 12)
    read_once.main(["models/any", str(file), *QUESTIONS])
    first, second = started
    assert first == second and first[1:4] == ["serve", "models/any", "--lola-state-dir"]
    said = capsys.readouterr().out
    (tokens,) = re.findall(r"^read note\.txt: ([\d,]+) tokens", said, re.M)
    before, _, after = said.partition("the server stops, and starts again\n")
    assert re.findall(r"^> (.*)$", before, re.M) == QUESTIONS[:2]
    assert re.findall(r"^> (.*)$", after, re.M) == QUESTIONS[2:]
    note = r"^\[turn (\d): ([\d,]+) tokens restored, (\d+) read, first word after [\d.]+ s\]$"
    turns = [tuple(map(number, turn)) for turn in re.findall(note, said, re.M)]
    assert [turn for turn, _, _ in turns] == [2, 3, 4], said
    # All that was there before is restored, the first time the file, and no turn reads much.
    assert turns[0][1] == number(tokens) > 400
    assert [restored for _, restored, _ in turns] == sorted(restored for _, restored, _ in turns)
    assert all(new < 80 for _, _, new in turns), said
    (goes_on,) = re.findall(r"^\[file: goes on after turn 3, ([\d,]+) tokens\]$", after, re.M)
    assert turns[2][1] == number(goes_on)
