"""The table of `lola_config`: docs/configuration.md, from `LolaConfig` and its docstring."""

from __future__ import annotations

import json

from lola_vllm.core.lola_config import LolaConfig
from tools.site.docstrings import entries, split
from tools.site.summaries import table

# Defaults that follow from something else.
FOLLOWS = {"update_interval": "`window_size`"}


def config_table() -> str:
    """A row for each field: its name, its default, its text."""
    words = entries(split(LolaConfig.__doc__ or "")["Attributes"])
    fields = LolaConfig.model_fields
    if list(words) != list(fields):
        raise ValueError(f"the docstring of LolaConfig has {list(words)}, not {list(fields)}")
    rows = [["`lola_config` key", "default", "meaning"]]
    for name, field in fields.items():
        value = json.dumps(field.default)
        text = words[name].replace("|", "\\|")
        rows.append([f"`{name}`", FOLLOWS.get(name, f"`{value}`"), text])
    return table(rows)
