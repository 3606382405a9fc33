"""Options of training that a user sets: a JSON object, checked against the options' own values."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from lola_vllm.models.files import CheckpointError

T = TypeVar("T")


def read_recipe(text: str | None) -> dict[str, Any]:
    """The value of `--recipe`: a JSON object, or the path of a file that holds one; None: {}.

    Raises:
        CheckpointError: it is neither.
    """
    if text is None:
        return {}
    try:
        value = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--recipe {text}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"--recipe {text}: must hold a JSON object")
    return value


def settled(options: T, given: Any, part: str = "") -> T:
    """A dataclass of options with the values that a user gave; the others stay.

    Args:
        part: of a recipe, for messages.

    Raises:
        CheckpointError: no object, an unknown key, or a value of another kind than the option's.
    """
    own = {item.name: getattr(options, item.name) for item in fields(cast(Any, options))}
    chosen, types = _chosen(own, given, part), get_type_hints(type(options))
    for key, value in chosen.items():
        if get_origin(types[key]) is Literal and value not in get_args(types[key]):
            allowed = ", ".join(get_args(types[key]))
            raise CheckpointError(f"--recipe: {key} = {value!r}: must be one of {allowed}")
    return type(options)(**own | chosen)


def unknown_key(name: str, known: list[str]) -> CheckpointError:
    """The error for a key of no option."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return CheckpointError(f"--recipe: unknown key {name!r}{hint}")


def _chosen(own: Mapping[str, Any], given: Any, part: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise CheckpointError(f"--recipe: {part} = {given!r}: must be an object")
    before = f"{part}." if part else ""
    for key in given.keys() - own.keys():
        raise unknown_key(before + key, [before + known for known in own])
    return {key: _like(before + key, own[key], value) for key, value in given.items()}


def _like(name: str, own: Any, value: Any) -> Any:
    """`value` if it is of the type of an option's own value."""
    if isinstance(own, Mapping):
        return {**own, **_chosen(own, value, name)}
    if isinstance(own, tuple):
        kind = type(own[0]) if own else int
        if isinstance(value, list | tuple) and value and all(type(x) is kind for x in value):
            return tuple(value)
    elif isinstance(own, float):
        if type(value) in (int, float):
            return float(value)
    elif type(value) is type(own) and not (type(value) is int and value < 0):
        return value
    raise CheckpointError(f"--recipe: {name} = {value!r}: must be of the kind of {own!r}")
