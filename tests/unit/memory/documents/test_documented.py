"""The programs of docs/library.md, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.documented import ROOT, programs
from tools.support.speaking import make_speaking


def run(number: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's program of this number leaves, of two."""
    make_speaking(directory / "models" / "smollm2-lola")
    monkeypatch.chdir(directory)
    found = programs(ROOT / "docs/library.md")
    assert len(found) == 2
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(found[number], "library.md", "exec"), names)
    return names


def test_the_program_finds_documents_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(0, tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3
    assert any(line.split()[0] in ("garden", "harbour", "library") for line in lines)


def test_the_program_recalls_a_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(1, tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip()
    past, recalled = names["past"], names["recalled"]
    assert len(past.keys) == len(past.tokens) // 128 > 3
    assert past.tokens[-6:] == names["answer"]
    if recalled.first is not None:
        assert recalled.last == recalled.first + 128
