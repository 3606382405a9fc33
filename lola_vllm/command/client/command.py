"""`lola-vllm sessions VERB` and `lola-vllm chat URL`: options, and what they print."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lola_vllm.command.client import ClientError
from lola_vllm.command.client.chat import MAX_TOKENS, chat
from lola_vllm.command.client.terminal import harmless, print

if TYPE_CHECKING:
    from lola_vllm.command.client.server import Server

Verb: TypeAlias = "Callable[[Server, argparse.Namespace], int | None]"
_NAME = "a session, as agent-7"
_REFERENCE = "a session or a turn of it, as agent-7 or agent-7@3"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


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


def age(text: str) -> float:
    """Seconds of `90s`, `30m`, `12h` or `7d`.

    Raises:
        argparse.ArgumentTypeError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an age as 90s, 30m, 12h or 7d")
    return float(found[1]) * _SECONDS[found[2]]


def add_sessions(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `lola-vllm sessions`."""
    verb = add_verbs(parser)

    def add(name: str, text: str, run: Verb, **options: str) -> argparse.ArgumentParser:
        added = verb(name, text, run)
        for option, help_text in options.items():
            added.add_argument(option, metavar=option.upper(), help=help_text)
        return added

    add("list", "the sessions of the server, the last used first", _list).add_argument(
        "--json", action="store_true", help="JSON instead of a table"
    )
    show = add("show", "a session and its states, or its text", _show, session=_REFERENCE)
    how = show.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="JSON instead of a table")
    how.add_argument(
        "--text", action="store_true",
        help="all that was said instead, with the marks of the chat template",
    )  # fmt: skip
    add("fork", "another session that goes on from this one", _fork, session=_REFERENCE,
        to="name of the new session")  # fmt: skip
    add("export", "write a session's state to a new file, a file for each rank", _export,
        session=_REFERENCE, file="of rank 0; others have their number behind")  # fmt: skip
    add("import", "store a state from a file, where the operator allows it", _import,
        file="as export wrote it", session="name of the new session")  # fmt: skip
    rm = add("rm", "delete a session, a turn of it, or many sessions", _rm)
    rm.add_argument("session", nargs="?", metavar="SESSION", help=_REFERENCE)
    many = rm.add_mutually_exclusive_group()
    many.add_argument(
        "--older-than", type=age, metavar="AGE",
        help="instead: sessions that were not used for so long, as 90s, 30m, 12h or 7d",
    )  # fmt: skip
    many.add_argument("--all", action="store_true", help="instead: all sessions")
    rm.add_argument("--yes", action="store_true", help="delete many without asking")


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lola-vllm chat`."""
    parser.add_argument("url", metavar="URL", help="of the server, as http://127.0.0.1:8000")
    parser.add_argument(
        "--session", metavar="NAME", help="to go on with, or a new one (default: a new name)"
    )
    asks = parser.add_mutually_exclusive_group()
    asks.add_argument(
        "--library", metavar="LIBRARY",
        help="to ask each message of; a new session goes on from what the first reads",
    )  # fmt: skip
    asks.add_argument(
        "--recall", action="store_true",
        help="bring back, for each message, the segment of the chat's own text that it asks about",
    )  # fmt: skip
    parser.add_argument("--model", metavar="NAME", help="a served name (default: the server's)")
    parser.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, metavar="N",
        help="at which an answer is cut (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, metavar="X", help="0 for the likeliest words")

    def run(args: argparse.Namespace) -> int:
        options = {name: getattr(args, name) for name in ("model", "max_tokens", "temperature")}
        given = {name: value for name, value in options.items() if value is not None}
        return chat(server_of(args), args.session, given, args.library, args.recall)

    parser.set_defaults(run=run)


def _list(server: Server, args: argparse.Namespace) -> None:
    found = server.sessions()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    rows = [("session", "turn", "tokens", "MiB", "last used", "")]
    rows += [
        (s["session"], s["turn"], f"{s['tokens']:,}", mib(s["bytes"]), ago(s["used"]),
         f"+{s['segments']} segments" if s["segments"] else "")
        for s in found
    ]  # fmt: skip
    table(rows)


def _show(server: Server, args: argparse.Namespace) -> None:
    if args.text:
        print(server.text(args.session))
        return
    found = server.session(args.session)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    rows = [("turn", "taken after", "tokens", "MiB", "where", "made")]
    rows += [
        (s["turn"], s["kind"], f"{s['tokens']:,}", mib(s["bytes"]), "+".join(s["tiers"]),
         ago(s["created"]))
        for s in found["states"]
    ]  # fmt: skip
    table(rows)


def _fork(server: Server, args: argparse.Namespace) -> None:
    from lola_vllm.command.client.server import path

    found = server.json("POST", path(args.session, "fork", turn=True), {"to": args.to})
    print(f"{found['session']}: goes on after {found['tokens']:,} tokens of {args.session}")


def _export(server: Server, args: argparse.Namespace) -> None:
    file = Path(args.file)
    written = server.state(args.session, file)
    size = written.bytes
    for rank in range(1, written.ranks):
        size += server.state(args.session, file.with_name(f"{file.name}.{rank}"), rank).bytes
    print(f"{file}: {size:,} bytes, ranks: {written.ranks}")


def _import(server: Server, args: argparse.Namespace) -> None:
    from lola_vllm.command.client.server import path

    found = server.upload(path(args.session, "state"), Path(args.file))
    print(f"{found['session']}: {found['tokens']:,} tokens")


def _rm(server: Server, args: argparse.Namespace) -> None:
    many = args.all or args.older_than is not None
    if many == (args.session is not None):
        raise ClientError("name one session, or many with --older-than AGE or --all")
    if not many:
        print(f"{args.session}: {server.delete(args.session)}")
        return
    found = server.sessions()
    if args.older_than is not None:
        before = time.time() - args.older_than
        found = [one for one in found if one["used"] < before]
    if not found:
        print("no session is that old" if args.older_than is not None else "there is no session")
        return
    if not args.yes:
        _confirm(f"delete {len(found)} sessions of {server.url}?")
    _delete_each(server, [one["session"] for one in found])


def _confirm(question: str) -> None:
    """Ask at a terminal.

    Raises:
        ClientError: the answer is no, or nobody is there to ask.
    """
    if not sys.stdin.isatty():
        raise ClientError(f"{question} give --yes, as there is no terminal to ask at")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise ClientError("nothing was deleted")


def _delete_each(server: Server, names: Sequence[str]) -> None:
    """Delete sessions, and go on after a refusal.

    Raises:
        ClientError: some were refused; the message has the reason of the first.
    """
    refused: list[str] = []
    for name in names:
        try:
            print(f"{name}: {server.delete(name)}", flush=True)
        except ClientError as error:
            if error.status is None:
                raise
            if error.status != HTTPStatus.NOT_FOUND:  # else it has gone since, with another one
                refused.append(f"{name}: {error}")
    if refused:
        raise ClientError(f"{len(refused)} of {len(names)} sessions are not deleted; {refused[0]}")


def table(rows: list[tuple[Any, ...]]) -> None:
    """Print rows, with the first as their head; numbers end below each other."""
    cells = [[harmless(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = [all(c[:1].isdigit() for c in column[1:]) for column in zip(*cells, strict=True)]
    for row in cells:
        parts = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ]
        print("  ".join(parts).rstrip())


def mib(nbytes: int) -> str:
    """Bytes in MiB."""
    return f"{nbytes / 2**20:.1f}"


def ago(moment: float) -> str:
    """How long a moment, in seconds since 1970, is ago."""
    seconds = max(0.0, time.time() - moment)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
