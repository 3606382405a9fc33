"""What verbs that talk to a server share on the command line: its URL, the key, how they run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from lola_vllm.command.client.server import Server

Verb: TypeAlias = "Callable[[Server, argparse.Namespace], int | None]"


def add_key(parser: argparse.ArgumentParser) -> None:
    """Add the option of the API key."""
    parser.add_argument(
        "--api-key", metavar="KEY", help="default: VLLM_API_KEY, which other users do not see"
    )


def server_of(args: argparse.Namespace) -> Server:
    """The server at `args.url`, with the API key of the command line or of the environment."""
    from lola_vllm.command.client.server import Server  # the command line starts without it

    return Server(args.url, args.api_key or os.environ.get("VLLM_API_KEY"))


def add_verbs(
    parser: argparse.ArgumentParser,
) -> Callable[[str, str, Verb], argparse.ArgumentParser]:
    """Let a command have verbs with the options `--url` and `--api-key`.

    Returns:
        Adds a verb: its name, a line for people, and what it does with the server, which returns
        the exit status (None: 0).
    """
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)"
    )
    add_key(common)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def add(name: str, text: str, run: Verb) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text, parents=[common])
        verb.set_defaults(run=lambda args: run(server_of(args), args) or 0)
        return verb

    return add
