"""Commands and programs in the README and on the pages of docs/, and what becomes of each in tests.

Every command of a page has a row in `COMMANDS`: a test runs it, or the row says why none does.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Fate:
    """What becomes of commands in tests.

    Attributes:
        how: "cli": tests/unit/test_documented.py runs it on a tiny model. "make": it asks make what
            the target does. "vllm": vLLM's own parser reads it there. "http":
            tests/serving/test_documented.py runs it against a server. "engine":
            tests/engine/test_documented.py runs it in an engine. "": none runs it as it is.
        why: it is not run, or not in full.
        test: that does in substance what the command does.
    """

    how: str = ""
    why: str = ""
    test: str = ""


INSTALLS = "installs packages, minutes and gigabytes"
IDLE = "measures for minutes to hours on an idle machine"
# By regular expressions; the first that matches a command counts.
COMMANDS: dict[str, Fate] = {
    r".*(?:\[--|CONFIG\|DIR|\(the same|,\.\.\.)": Fate(
        why="a form, not a command; tests/unit/test_docs.py checks the program's options"
    ),
    # To set up, to build, to release.
    r"apt-get ": Fate(why="installs system packages"),
    r"export PIP_EXTRA_INDEX_URL=": Fate(why="the reader's own address"),
    r"\. \.venv/bin/activate": Fate(why="changes the reader's shell"),
    r"pip (?:install|uninstall) ": Fate(why=INSTALLS),
    r"PIP_EXTRA_INDEX_URL=<that address> make serve": Fate(why=INSTALLS),
    r"make ": Fate(
        "make", why="targets take minutes to hours", test="tests/unit/test_packaging.py"
    ),
    r"\.venv/bin/python -m build": Fate(why="compiles", test="tests/unit/test_release.py"),
    r"(?:GRAFANA_PASSWORD=\S+ )?.*docker ": Fate(
        why="needs a Docker engine", test="tests/unit/serving/test_deploy.py"
    ),
    # To make models.
    r"lola-vllm estimate ": Fate("cli"),
    r"lola-vllm quantize ": Fate("cli"),
    r"lola-vllm convert ": Fate("cli"),
    r"lola-vllm distill ": Fate("cli", why="with fewer and shorter rows"),
    r"lola-vllm linearize ": Fate(
        why="trains for hours", test="tests/unit/command/linearize/test_linearize.py"
    ),
    r"lola-vllm demo-model ": Fate(
        why="needs a wheel of 90 MB", test="tests/unit/models/test_demo.py"
    ),
    r"lola-vllm calibrate ": Fate(
        why="56 prompts of 2,048 and 4,096 tokens",
        test="tests/unit/training/calibrate/test_calibrate.py",
    ),
    r"lola-vllm states ": Fate(
        why="needs a directory of a server", test="tests/unit/memory/sessions/test_command.py"
    ),
    # To measure.
    r"lola-vllm eval copy ": Fate(
        why="minutes to hours", test="tests/unit/evaluation/test_copying.py"
    ),
    r"lola-vllm eval \w+ --model models/my-lola ": Fate(
        "engine", why="with fewer and shorter samples", test="tests/engine/test_eval.py"
    ),
    r"lola-vllm eval ": Fate(why="minutes to hours", test="tests/engine/test_eval.py"),
    r"OPENAI_API_KEY=\S+ lm_eval ": Fate(
        why="lm-eval is not installed for tests", test="tests/unit/evaluation/test_tasks.py"
    ),
    r"(?:OMP_PROC_BIND=true )?python benchmarks/": Fate(why=IDLE),
    r"LOLA_VLLM_LONG=1 ": Fate(why=IDLE, test="tests/reliability/test_storm.py"),
    r"(?:\.venv/bin/)?python -m tools\.read_once ": Fate(
        why="with a tiny model and a short file", test="tests/serving/test_read_once.py"
    ),
    r"python -m tools\.texts ": Fate(
        why="downloads 45 MB of packages", test="tests/unit/tools/texts/test_texts.py"
    ),
    r"(?:\.venv/bin/)?python -m tools\.": Fate(why=IDLE),
    # To serve.
    r"(?:\.venv/bin/)?lola-vllm serve ": Fate(
        "cli", why="with --dry-run", test="tests/serving/test_serve.py"
    ),
    r"(?:VLLM_PLUGINS=lola )?vllm serve ": Fate(
        "vllm", why="starts a server", test="tests/engine/test_parallel.py"
    ),
    r"lola-vllm doctor ": Fate(why="of this machine", test="tests/unit/command/test_doctor.py"),
    r"curl ": Fate("http"),
    r"lola-vllm library ": Fate(
        why="reads long texts", test="tests/serving/library/test_routes.py"
    ),
    r"(?:\.venv/bin/)?lola-vllm (?:sessions|chat) ": Fate("http"),
}


def fate(command: str) -> tuple[str, Fate]:
    """The row of a command.

    Raises:
        LookupError: no row has it; the message is the remedy.
    """
    for pattern, found in COMMANDS.items():
        if re.match(pattern, command):
            return pattern, found
    raise LookupError(f"{command}\nadd it to COMMANDS in tests/support/documented.py, with a test")


def documented(how: str) -> list[tuple[str, str]]:
    """Page and command of all that are run in one way, in their order."""
    return [
        (page.relative_to(ROOT).as_posix(), command)
        for page in PAGES
        for command in commands(page)
        if fate(command)[1].how == how
    ]
