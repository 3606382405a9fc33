"""The table of `lola_config` in docs/configuration.md, from `LolaConfig` and its docstring.

    python -m tools.site.config_table     # after a change of a field or of its text

The table is part of the page, so that the page can be read without the site.
"""

from __future__ import annotations

import re
from pathlib import Path

from lola_vllm.core.config import LolaConfig
from tools.site.docstrings import entries, split

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
BEGIN = "<!-- made by python -m tools.site.config_table -->\n"
END = "<!-- end -->\n"
# Defaults that follow from something else.
FOLLOWS = {"update_interval": "`window_size`"}


def table() -> str:
    """A row for each field: its name, its default, its text."""
    words = entries(split(LolaConfig.__doc__ or "")["Attributes"])
    fields = LolaConfig.model_fields
    if list(words) != list(fields):
        raise ValueError(f"the docstring of LolaConfig has {list(words)}, not {list(fields)}")
    rows = ["| `lola_config` key | default | meaning |", "|---|---|---|"]
    for name, field in fields.items():
        value = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
        text = words[name].replace("|", "\\|")
        rows.append(f"| `{name}` | {FOLLOWS.get(name, f'`{value}`')} | {text} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """The page with the table of now."""
    found = re.search(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", page, re.S)
    if found is None:
        raise ValueError(f"{PAGE}: has no lines {BEGIN!r} and {END!r} around the table")
    return page[: found.start()] + table() + page[found.end() :]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
