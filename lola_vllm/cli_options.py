"""Options that several subcommands of `lola-vllm` share, and how their values are read."""

from __future__ import annotations

import argparse
import difflib
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from lola_vllm.config import LolaConfig, LolaLlamaConfig


def sizes(text: str) -> int | list[int]:
    """A number, or several with commas."""
    numbers = [int(part) for part in text.split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


# Options that set a key of lola_config. Their values are checked there, not here.
LOLA_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "window_size": (int, "pairs kept exactly after every update, in tokens"),
    "sparse_cache_size": (
        sizes,
        "exact pairs kept by self-recall error, or one such number per layer, with commas; 0 is "
        "LoLCATs",
    ),
    "update_interval": (int, "tokens between two updates (default: the window size)"),
    "sink_size": (int, "first positions that stay exact for ever"),
    "context_shift": (
        int,
        "positions by which contexts shift when the base's trained length is used up (new "
        "checkpoints: a quarter of it); 0: contexts end there",
    ),
    "score_decay": (
        float,
        "power of the hidden state's decay by which the scores of sparse pairs decay at a context "
        "shift; "
        "0: never",
    ),
    "score_decay_shifts": (
        int,
        "context shifts at which the score of a pair decays, after which it stays (default: all)",
    ),
    "fold_rotation": (
        int,
        "context shifts by which keys are rotated further before they are folded, "
        "in contexts beyond the base's trained length",
    ),
    "bucket_start": (
        int,
        "first RoPE position of the bucket of old exact keys in contexts beyond the base's trained "
        "length",
    ),
    "feature_dim": (int, "columns of a feature map (init, demo-model: the head size, no other)"),
    "mixing": (str, "how softmax and linear parts are weighted: lola or lolcats"),
    "state_dtype": (str, "storage of the hidden state: float32, no other"),
    "sparse_sharing": (str, "sparse sets shared inside a KV group: none or kv_head"),
    "sparse_dtype": (
        str,
        "how pairs outside the window are kept: model (in the model's dtype) or int8 (twice as "
        "many in the same memory)",
    ),
}


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


class Parser(argparse.ArgumentParser):
    """A parser, also of subcommands, that names the nearest option to one that it does not know.

    It checks before argparse does, which would first report the intended option as missing.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        rest = (argparse.PARSER, argparse.REMAINDER)  # another parser checks what follows
        if args is not None and not any(action.nargs in rest for action in self._actions):
            self._check_names(args)
        return super().parse_known_args(args, namespace)

    def _check_names(self, args: Sequence[str]) -> None:
        for arg in args:
            if arg == "--":
                return
            name = arg.partition("=")[0]
            options = [option for option in self._option_string_actions if option[:2] == "--"]
            if name[:2] == "--" and not any(option.startswith(name) for option in options):
                near = difflib.get_close_matches(name, options, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help"
                self.error(f"unrecognized option: {name}{hint}")


def add_lola_options(
    parser: argparse.ArgumentParser, without: Collection[str] = ()
) -> argparse._ArgumentGroup:
    """One option per key of `lola_config`, those in `without` left out."""
    group = parser.add_argument_group("LoLA options", "keys of lola_config in config.json")
    for key, (kind, text) in LOLA_OPTIONS.items():
        if key not in without:
            metavar = "NAME" if kind is str else "N"
            group.add_argument(f"--{key.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    return group


def add_state_heads(group: argparse._ArgumentGroup, default: str | None, named: str) -> None:
    """`--state-heads`; `named` says in the help what the default is."""
    group.add_argument(
        "--state-heads",
        choices=("kv", "query"),
        default=default,
        help=f"key feature maps: one per KV head or one per query head (default: {named})",
    )


def lola_config_of(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of `lola_config` that the user gave."""
    given = {key: getattr(args, key, None) for key in LOLA_OPTIONS}
    return {key: value for key, value in given.items() if value is not None}


def sparse_cache(lola: LolaConfig) -> str:
    """`sparse_cache_size` and `sparse_dtype` in words."""
    sizes, as_int8 = lola.sizes, " as int8" if lola.sparse_dtype == "int8" else ""
    layers = lola.sparse_cache_size
    if isinstance(layers, int):
        return f"{layers}{as_int8}"
    what = "layer" if all(isinstance(size, int) for size in layers) else "layer and head"
    mean = sum(sizes) / len(sizes)
    return f"{min(sizes)} to {max(sizes)} by {what} ({mean:.0f} on average){as_int8}"


def summarize(out: Path, config: LolaLlamaConfig, maps: str, also: str = "") -> None:
    """Say what was written and what to do next."""
    lola = config.lola
    print(
        f"LoLA checkpoint with {maps} feature maps: {out} (window {lola.window_size}, "
        f"sparse cache {sparse_cache(lola)}, sinks {lola.sink_size}){also}"
    )
    print(f"next: lola-vllm serve {shlex.quote(str(out))}")
