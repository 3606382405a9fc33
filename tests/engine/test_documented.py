"""The programs with `LLM(...)` in the README and in docs/, on a tiny model in this process."""

import pytest

from tests.support.documented import ROOT, programs
from tests.support.speaking import make_speaking


@pytest.mark.parametrize("page", ["README.md", "docs/howto/python.md"])
def test_program_answers(page, tmp_path, monkeypatch, capsys):
    make_speaking(tmp_path / "models" / "smollm2-lola")
    monkeypatch.chdir(tmp_path)
    (program,) = [text for text in programs(ROOT / page) if "LLM(" in text]
    model = '"models/smollm2-lola",'
    program = program.replace(model, f"{model} max_model_len=1024, dtype='float32',")
    exec(compile(program, page, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed.strip()
    if page == "docs/howto/python.md":
        (told,) = [line for line in printed.splitlines() if line.startswith("{'session'")]
        # Whether tokens are restored depends on where a tokenizer parts the answer from the chat.
        assert "'session': 'physics', 'turn': 2" in told and "'restored_tokens'" in told
