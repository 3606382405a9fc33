"""Options that several subcommands of `lola-vllm` share, and how their values are read."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lola_vllm.core.config import DecoderConfig
    from lola_vllm.core.lola_config import LolaConfig


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
