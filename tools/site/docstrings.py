"""Sections of docstrings in Google's form."""

from __future__ import annotations

import inspect
import re

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
_ENTRY = re.compile(r"(\*{0,2}[A-Za-z_]\w*(?:, \w+)*): ")


def split(text: str) -> dict[str, str]:
    """The text of each section; what stands before the first one is under ""."""
    parts: dict[str, list[str]] = {"": []}
    lines = parts[""]
    for line in inspect.cleandoc(text).splitlines():
        if line.removesuffix(":") in SECTIONS and line.endswith(":"):
            lines = parts.setdefault(line[:-1], [])
        else:
            lines.append(line)
    return {name: inspect.cleandoc("\n".join(lines)) for name, lines in parts.items()}


def entries(section: str) -> dict[str, str]:
    """Name -> text, each on one line, of a section with a name in front of each text."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in section.splitlines():
        entry = _ENTRY.match(line)
        if entry:
            name, line = entry[1], line[entry.end() :]
            found[name] = []
        elif not found:
            raise ValueError(f"a section begins without a name: {line!r}")
        found[name].append(line.strip())
    return {name: " ".join(lines) for name, lines in found.items()}
