"""Command lines of `vllm serve`: the options that they set, and printing them without secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from lola_vllm.models.files import CheckpointError

# Short forms of the options that matter here.
_SHORT = {
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-dpl": "data-parallel-size-local",
    "-n": "nnodes",
    "-q": "quantization",
    "-cc": "compilation-config",
    "-O": "optimization-level",
}
# Options whose values vLLM's own log hides.
SECRETS = ("api-key", "hf-token", "watermark-config")
MASK = "***"
_LONG = re.compile(r"--[A-Za-z][\w.+-]*")


def given_options(options: Sequence[str]) -> dict[str, str]:
    """What a command line of `vllm serve` sets: long name without dashes -> value, "" for flags.

    Options of a `--config` file are included. The command line takes precedence over it, as in
    vLLM. The name of a dotted option such as `-cc.mode` is the part before the dot.

    Raises:
        CheckpointError: a `--config` file that cannot be read.
    """
    given: dict[str, str] = {}
    name = None
    for part in options:
        option = _name(part)
        if option is not None:
            given[option] = part.partition("=")[2]
            name = None if "=" in part else option
        elif name is not None:
            given[name] = part
            name = None
    if "config" in given:
        given = {**_config_file(Path(given["config"])), **given}
    return given


def masked(options: Sequence[str]) -> list[str]:
    """The command line with the values of secret options hidden, to be printed.

    vLLM accepts abbreviated options, underscores, `=`, and several keys after one option. All
    arguments after a secret option are hidden up to one with two dashes. One dash is not enough,
    because a key may begin with it.
    """
    shown = []
    secret = False
    for part in options:
        head, equals, _ = part.partition("=")
        if _LONG.fullmatch(head):
            secret = _is_secret(head)
            shown.append(f"{head}={MASK}" if secret and equals else part)
        else:
            shown.append(MASK if secret else part)
    return shown


def number(text: str | None) -> int | None:
    """An integer as vLLM reads it (k, m, g for thousands, K, M, G for 1024), None if it is none."""
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    try:
        if text and text[-1] in units:
            return int(float(text[:-1]) * units[text[-1]])
        return int(text) if text else None
    except ValueError:
        return None


def _name(part: str) -> str | None:
    """The long name of an option; None for a value."""
    head = part.partition("=")[0]
    head = head.partition(".")[0] if head.startswith("-") else head
    if head.startswith("-O") and head[2:].isdigit():
        return _SHORT["-O"]
    if head in _SHORT:
        return _SHORT[head]
    return head[2:].replace("_", "-") if head.startswith("--") else None


def _is_secret(head: str) -> bool:
    """Whether an option is secret, or may be the abbreviation of a secret one."""
    name = _name(head)
    return name is not None and any(secret.startswith(name) for secret in SECRETS)


def _config_file(path: Path) -> dict[str, str]:
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
    given = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if value is False:  # as vLLM reads it
            name, value = f"no-{name}", True
        given[name] = (
            "" if value is True else value if isinstance(value, str) else json.dumps(value)
        )
    return given
