"""The program of docs/library.md, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.documented import ROOT, programs
from tools.support.speaking import make_speaking


def test_the_program_finds_documents_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_speaking(tmp_path / "models" / "smollm2-lola")
    monkeypatch.chdir(tmp_path)
    (program,) = programs(ROOT / "docs/library.md")
    exec(compile(program, "library.md", "exec"), {"__name__": "__main__"})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3
    assert any(line.split()[0] in ("garden", "harbour", "library") for line in lines)
