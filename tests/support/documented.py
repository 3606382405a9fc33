"""Commands and programs in the README and on the pages of docs/, and which of them tests run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
_PROGRAM = re.compile(
    r"(?:(?:export )?[A-Z_]+=(?:<[^>]*>|\S+)\s+)*"
    r"(?:(?:lola-vllm|vllm|python|pip|make|docker|curl|apt-get|lm_eval|git|bash|\.) |"
    r"(?:\.venv/bin/|benchmarks/|tools/)[\w.-]+(?: |$))|export [A-Z_]+="
)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each block of code: "text" for a fence without one, "" if indented."""
    language, lines, fenced, before = "", list[str](), False, ""
    for line in [*page.read_text().splitlines(), "end"]:
        fence = re.match(r"\s*```(\w*)$", line)
        inside = fenced or (line.startswith("    ") and bool(lines or not before.strip()))
        ends = fence if fenced else lines and not inside and line.strip()
        if ends:
            yield language, "\n".join(lines)
            lines = []
        if fence:
            fenced = not fenced
            language = (fence[1] or "text") if fenced else ""
        elif inside or (lines and not line.strip()):
            lines.append(line if fenced else line.strip())
        before = line


def commands(page: Path) -> Iterator[str]:
    """Each command of a page on one line, as the shell reads it."""
    for language, text in blocks(page):
        if language not in ("", "bash"):
            continue
        command = ""
        for line in text.splitlines():
            command += line.strip()
            if command.endswith("\\"):
                command = command[:-1]
                continue
            if _PROGRAM.match(command):
                try:
                    shlex.split(command)
                except ValueError:  # a quoted text goes on in the next line
                    command += " "
                    continue
                yield re.sub(r"\s{2,}#.*", "", command)
            command = ""


def programs(page: Path) -> list[str]:
    """The Python programs of a page."""
    return [text for language, text in blocks(page) if language == "python"]


# What tests do with commands, by how these begin. "cli": tests/unit/test_documented.py runs them on
# tiny models. "make": it asks make what the targets do. "vllm": vLLM's own parser reads them there.
# "http": tests/serving/test_documented.py runs them against a server.
HOW = {
    "cli": r"(?:lola-vllm (?:estimate|quantize|convert|distill)|(?:\.venv/bin/)?lola-vllm serve) ",
    "make": r"make ",
    "vllm": r"(?:VLLM_PLUGINS=lola )?vllm serve ",
    "http": r"(?:curl|(?:\.venv/bin/)?lola-vllm (?:sessions|chat)) ",
}
_FORM = re.compile(r".*(?:\[--|CONFIG\|DIR|\(the same|,\.\.\.)")  # and no command


def documented(how: str) -> list[tuple[str, str]]:
    """Page and command of all that are run in one way, in their order."""
    return [
        (page.relative_to(ROOT).as_posix(), command)
        for page in PAGES
        for command in commands(page)
        if re.match(HOW[how], command) and not _FORM.match(command)
    ]
