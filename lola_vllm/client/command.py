"""`lola-vllm sessions VERB` and `lola-vllm chat URL`: options, and what they print."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lola_vllm.client.server import Server

_NAME = "a session, as agent-7"
_REFERENCE = "a session or a turn of it, as agent-7 or agent-7@3"


def add_sessions(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `lola-vllm sessions`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)"
    )
    _add_key(common)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def add(
        name: str, text: str, run: Callable[[Server, argparse.Namespace], None], **options: str
    ) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text, parents=[common])
        for option, help_text in options.items():
            verb.add_argument(option, metavar=option.upper(), help=help_text)
        verb.set_defaults(run=lambda args: _run(run, args))
        return verb

    add("list", "the sessions of the server, the last used first", _list).add_argument(
        "--json", action="store_true", help="JSON instead of a table"
    )
    add("show", "a session and its states", _show, session=_NAME).add_argument(
        "--json", action="store_true", help="JSON instead of a table"
    )
    add("fork", "another session that goes on from this one", _fork, session=_REFERENCE,
        to="name of the new session")  # fmt: skip
    export = add("export", "write a session's state to a file", _export, session=_REFERENCE,
                 file="a new file")  # fmt: skip
    export.add_argument("--rank", type=int, default=0, metavar="N", help="of several (default: 0)")
    add("import", "store a state from a file, where the operator allows it", _import,
        file="as export wrote it", session="name of the new session")  # fmt: skip
    add("rm", "delete a session, or a turn of it", _rm, session=_REFERENCE)


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lola-vllm chat`."""
    parser.add_argument("url", metavar="URL", help="of the server, as http://127.0.0.1:8000")
    parser.add_argument(
        "--session", metavar="NAME", help="to go on with, or a new one (default: a new name)"
    )
    parser.add_argument("--model", metavar="NAME", help="a served name (default: the server's)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 for the likeliest words")
    _add_key(parser)

    def run(args: argparse.Namespace) -> int:
        from lola_vllm.client.chat import chat
        from lola_vllm.client.server import Server

        options = {name: getattr(args, name) for name in ("model", "max_tokens", "temperature")}
        given = {name: value for name, value in options.items() if value is not None}
        return chat(Server(args.url, _key(args)), args.session, given)

    parser.set_defaults(run=run)


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key", metavar="KEY", help="default: VLLM_API_KEY, which other users do not see"
    )


def _key(args: argparse.Namespace) -> str | None:
    key: str | None = args.api_key or os.environ.get("VLLM_API_KEY")
    return key


def _run(verb: Callable[[Server, argparse.Namespace], None], args: argparse.Namespace) -> int:
    from lola_vllm.client.server import Server

    verb(Server(args.url, _key(args)), args)
    return 0


def _list(server: Server, args: argparse.Namespace) -> None:
    found = server.sessions()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    rows = [("session", "turn", "tokens", "MiB", "last used", "")]
    rows += [
        (s["session"], s["turn"], f"{s['tokens']:,}", _mib(s["bytes"]), _ago(s["used"]),
         "pinned" if s["pinned"] else "")
        for s in found
    ]  # fmt: skip
    _table(rows)


def _show(server: Server, args: argparse.Namespace) -> None:
    found = server.session(args.session)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    rows = [("turn", "taken after", "tokens", "MiB", "where", "made", "")]
    rows += [
        (s["turn"], s["kind"], f"{s['tokens']:,}", _mib(s["bytes"]), "+".join(s["tiers"]),
         _ago(s["created"]), "pinned" if s["pinned"] else "")
        for s in found["states"]
    ]  # fmt: skip
    _table(rows)


def _fork(server: Server, args: argparse.Namespace) -> None:
    from lola_vllm.client.server import path

    found = server.json("POST", path(args.session, "fork", turn=True), {"to": args.to})
    print(f"{found['session']}: goes on after {found['tokens']:,} tokens of {args.session}")


def _export(server: Server, args: argparse.Namespace) -> None:
    from lola_vllm.client.server import path

    where = path(args.session, "state", turn=True) + (f"?rank={args.rank}" if args.rank else "")
    print(f"{args.file}: {server.download(where, Path(args.file)):,} bytes")


def _import(server: Server, args: argparse.Namespace) -> None:
    from lola_vllm.client.server import path

    found = server.upload(path(args.session, "state"), Path(args.file))
    print(f"{found['session']}: {found['tokens']:,} tokens")


def _rm(server: Server, args: argparse.Namespace) -> None:
    from lola_vllm.client.server import path

    found = server.json("DELETE", path(args.session, turn=True))
    print(f"{args.session}: {found['deleted']} states deleted")


def _table(rows: list[tuple[Any, ...]]) -> None:
    """Print rows, with the first as their head; numbers end below each other."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = [all(c[:1].isdigit() for c in column[1:]) for column in zip(*cells, strict=True)]
    for row in cells:
        parts = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ]
        print("  ".join(parts).rstrip())


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f}"


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
