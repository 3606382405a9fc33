"""The programs of docs/library.md, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.documented import ROOT, programs
from tools.support.speaking import make_speaking


def test_the_program_finds_documents_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_speaking(tmp_path / "models" / "smollm2-lola")
    monkeypatch.chdir(tmp_path)
    program, _ = programs(ROOT / "docs/library.md")
    exec(compile(program, "library.md", "exec"), {"__name__": "__main__"})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3
    assert any(line.split()[0] in ("garden", "harbour", "library") for line in lines)


def test_the_program_recalls_a_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_speaking(tmp_path / "models" / "smollm2-lola")
    monkeypatch.chdir(tmp_path)
    _, program = programs(ROOT / "docs/library.md")
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(program, "library.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    past, recalled = names["past"], names["recalled"]
    assert len(past.keys) == len(past.tokens) // 128 > 3
    assert past.tokens[-6:] == names["answer"]
    if recalled.first is not None:
        assert recalled.last == recalled.first + 128
