"""The options that a command line of `vllm serve` names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from lola_vllm.models.files import CheckpointError

# Short forms of the options that matter here.
_SHORT = {
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-dpl": "data-parallel-size-local",
    "-q": "quantization",
    "-cc": "compilation-config",
    "-O": "optimization-level",
}


def named_options(options: Sequence[str]) -> set[str]:
    """The options that a command line of `vllm serve` names, by their long names without dashes.

    Those of a `--config` file are among them, whatever it says of them. The name of a dotted option
    such as `-cc.mode` is the part before the dot.

    Raises:
        CheckpointError: a `--config` file that cannot be read.
    """
    named = {name for part in options if (name := _name(part)) is not None}
    for part, following in pairwise([*options, ""]):
        if _name(part) == "config":
            named |= _config_file(Path(part.partition("=")[2] or following))
    return named


def _name(part: str) -> str | None:
    """The long name of an option; None for a value."""
    head = part.partition("=")[0]
    head = head.partition(".")[0] if head.startswith("-") else head
    if head.startswith("-O") and head[2:].isdigit():
        return _SHORT["-O"]
    if head in _SHORT:
        return _SHORT[head]
    return head[2:].replace("_", "-") if head.startswith("--") else None


def _config_file(path: Path) -> set[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:  # its text would show nearby lines, which may have keys
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise CheckpointError(f"--config {path}: not valid YAML{where}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"--config {path}: must hold option names and their values")
    return {str(key).replace("_", "-") for key in content}
