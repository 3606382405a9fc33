"""Options that several subcommands of `lola-vllm` share, and how their values are read."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from lola_vllm.core.config import DecoderConfig, LolaConfig


T = TypeVar("T")
# Arguments of `add_argument` by a field's type.
_BY_TYPE: dict[Any, dict[str, Any]] = {
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    str: {"metavar": "NAME"},
    bool: {"action": "store_true"},
}


def option(help: str, default: Any = MISSING, *, part: str = "", **how: Any) -> Any:
    """A field of a dataclass that is an option of the command line as well.

    Args:
        help: text of the option, without its default.
        default: of field and option; without one both are required. On the command line a list is
            a text with commas, which the command splits.
        part: of the dataclass, see `add_fields`.
        how: arguments of `add_argument` that replace those that follow from the field's type.
    """
    metadata = {"help": help, "part": part, "how": how}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def add_fields(parser: argparse._ActionsContainer, kind: Any, part: str = "") -> None:
    """Add an option for each field of the dataclass `kind` that `option` made and is of `part`."""
    types = get_type_hints(kind)
    for item in fields(kind):
        if item.metadata.get("part") != part:
            continue
        text, default = item.metadata["help"], item.default
        how = dict(_BY_TYPE.get(types[item.name], {}))
        if get_origin(types[item.name]) is Literal:
            how = {"choices": get_args(types[item.name])}
        elif item.default_factory is not MISSING:
            how = {"metavar": "LIST"}
            default = ",".join(map(str, item.default_factory()))
        if default is MISSING:
            how["required"] = True
        else:
            how["default"] = default
            shown = f"{default:g}" if isinstance(default, float) else default
            none = default is None or default is False or default == ()
            if not none and "default" not in text:
                text += f" (default: {shown})"
        name = item.name.replace("_", "-")
        parser.add_argument(f"--{name}", help=text, **{**how, **item.metadata["how"]})


def from_options(kind: type[T], args: argparse.Namespace, **others: Any) -> T:
    """The dataclass `kind` with what the user gave, but for the fields in `others`."""
    made = [item.name for item in fields(kind) if "part" in item.metadata]  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in made} | others)


def add_lola_config(parser: argparse._ActionsContainer) -> None:
    """`--lola-config`; its keys and values are checked in `LolaConfig`, not here."""
    parser.add_argument(
        "--lola-config",
        type=json_object,
        default={},
        metavar="JSON",
        help='keys of lola_config to set, such as \'{"window_size": 64, "sink_size": 4}\'; '
        "docs/configuration.md has them",
    )


def json_object(text: str) -> dict[str, Any]:
    """A value of an option that is a JSON object; `ArgumentTypeError` for others."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text}: must be an object, such as {{}}")
    return value


def sparse_cache(lola: LolaConfig) -> str:
    """`sparse_cache_size` and `sparse_dtype` in words."""
    sizes, as_int8 = lola.sizes, " as int8" if lola.sparse_dtype == "int8" else ""
    layers = lola.sparse_cache_size
    if isinstance(layers, int):
        return f"{layers}{as_int8}"
    what = "layer" if all(isinstance(size, int) for size in layers) else "layer and head"
    mean = sum(sizes) / len(sizes)
    return f"{min(sizes)} to {max(sizes)} by {what} ({mean:.0f} on average){as_int8}"


def summarize(out: Path, config: DecoderConfig, maps: str) -> None:
    """Say what was written and what to do next."""
    lola = config.lola
    print(
        f"LoLA checkpoint with {maps} feature maps: {out} (window {lola.window_size}, "
        f"sparse cache {sparse_cache(lola)}, sinks {lola.sink_size})"
    )
    print(f"next: lola-vllm serve {shlex.quote(str(out))}")
