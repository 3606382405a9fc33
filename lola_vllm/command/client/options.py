"""What verbs that talk to a server share on the command line: its URL, and how they run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from lola_vllm.command.client.server import Server

Verb: TypeAlias = "Callable[[Server, argparse.Namespace], int | None]"


def server_of(args: argparse.Namespace) -> Server:
    """The server at `args.url`. The API key is in the environment, unseen by other users."""
    from lola_vllm.command.client.server import Server  # the command line starts without it

    return Server(args.url, os.environ.get("VLLM_API_KEY"))


def add_verbs(
    parser: argparse.ArgumentParser,
) -> Callable[[str, str, Verb], argparse.ArgumentParser]:
    """Let a command have verbs with the option `--url`.

    Returns:
        Adds a verb: its name, a line for people, and what it does with the server, which returns
        the exit status (None: 0).
    """
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)"
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def add(name: str, text: str, run: Verb) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text, parents=[common])
        verb.set_defaults(run=lambda args: run(server_of(args), args) or 0)
        return verb

    return add
