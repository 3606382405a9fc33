"""The demonstration of the README, with the demo model and a short file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.servers import ROOT
from tools import read_once

QUESTIONS = ["What is the code of the vault?", "Say it again.", "What is the code of the vault?"]


def test_a_file_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "note.txt"
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    file.write_text(noise * 12 + "The code of the vault is 73192. " + noise * 12)
    read_once.main([str(ROOT / "models" / "smollm2-lola"), str(file), *QUESTIONS])
    said = capsys.readouterr().out
    (tokens,) = re.findall(r"^read note\.txt: (\d+) tokens", said, re.M)
    before, _, after = said.partition("the server stops, and starts again\n")
    assert re.findall(r"^> (.*)$", before, re.M) == QUESTIONS[:2]
    assert re.findall(r"^> (.*)$", after, re.M) == QUESTIONS[2:]
    assert "73192" in before and "73192" in after, said
    note = r"^\[turn (\d): (\d+) tokens restored, (\d+) read, first word after [\d.]+ s\]$"
    turns = [tuple(map(int, turn)) for turn in re.findall(note, said, re.M)]
    assert [turn for turn, _, _ in turns] == [2, 3, 4], said
    # All that was there before is restored, the first time the file, and no turn reads much.
    assert turns[0][1] == int(tokens) > 400
    assert [restored for _, restored, _ in turns] == sorted(restored for _, restored, _ in turns)
    assert all(new < 40 for _, _, new in turns), said
    (goes_on,) = re.findall(r"^\[file: goes on after turn 3, (\d+) tokens\]$", after, re.M)
    assert turns[2][1] == int(goes_on)
